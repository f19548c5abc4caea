"""What a run's plan says besides its tables."""

from pathlib import Path

import pytest

from kfac_dist.config.load import load_config
from kfac_dist.planning.explain import explain

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(("fraction", "told"), [("0.0625", True), ("1", False)])
def test_a_part_of_the_samples_is_told(fraction, told):
    text = explain(load_config(QUICKSTART, [f"kfac.sample_fraction={fraction}"]), num_ranks=1)
    assert ("A and G from the first 4 of the 64 images of each slot" in text) is told

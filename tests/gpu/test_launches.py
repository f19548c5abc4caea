"""How many operations a step gives to the GPU: where they are many, the host holds it up."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.gpu


def test_a_stale_step_takes_a_third_more_than_torchs_sgd_at_most(
    tmp_path: Path, run_python: Callable[..., CompletedProcess[str]]
) -> None:
    program = [ROOT / "benchmarks/launches.py", "--image-size", "16", "--batch", "4", "--output", tmp_path / "record"]
    finished = run_python([*program, "--model", "resnet20", "--precision", "bf16"], timeout=120)
    assert finished.returncode == 0, finished.stderr
    (counts,) = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["results"].values()
    torch_sgd = counts["torch"]["total"]
    assert counts["stale"]["forward"] == counts["torch"]["forward"]
    assert counts["stale"]["backward"] == counts["torch"]["backward"]
    assert 1.0 < counts["stale"]["total"] / torch_sgd < 1.34
    assert 2.0 < counts["refresh"]["total"] / torch_sgd < 7.5

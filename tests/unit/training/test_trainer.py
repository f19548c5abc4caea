"""The trainer's state: a run that goes on from it ends as the run that was not interrupted."""

import copy
from pathlib import Path

import pytest
import torch

from kfac_dist import create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.training.run_state import restore_state, take_state
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

SETTINGS = (
    "train.epochs=1",
    "augment={pad_crop: 1, flip: true, mixup_alpha: 0.4}",
    "kfac.ema_decay=0.9",
    "kfac.refresh={schedule: adaptive, threshold: 0.1}",
)


@pytest.mark.parametrize("extra", [[], ["train.precision=fp16"], ["optimizer.name=sgd", "kfac=null"]])
def test_a_run_goes_on_from_its_state_bit_for_bit(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    overrides = [text for text in SETTINGS if not (extra and "sgd" in extra[0] and text.startswith("kfac"))]
    config = load_config(QUICKSTART, [*overrides, *extra, f"run.output_dir={tmp_path}"])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))

    def make() -> Trainer:
        return Trainer(config, communicator, torch.device("cpu"))

    whole, first, second = make(), make(), make()
    whole.train()
    first.schedules.num_iterations = 7
    first.train()
    restore_state(second, copy.deepcopy(take_state(first)))
    second.train()
    assert second.iteration == whole.iteration == 12
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert (second.top1, second.best_top1) == (whole.top1, max(whole.top1, first.top1))

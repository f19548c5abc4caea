"""A run of each baseline goes on from its checkpoint bit for bit, its optimizer's state and loss scale included."""

from pathlib import Path

import pytest
import torch

from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.config.load import load_config
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

BASELINES = {
    "sgd": "{name: sgd, learning_rate: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.01, decayed: weights}",
    "muon": "{name: muon, learning_rate: 0.1, momentum: 0.6, weight_decay: 0.01, decayed: weights}",
    "adamw": "{name: adamw, learning_rate: 0.01, momentum: 0.9, weight_decay: 0.01}",
    "lars": "{name: lars, learning_rate: 4, momentum: 0.5, weight_decay: 0.001, nesterov: true}",
}


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in BASELINES), ("muon", "fp16")])
def test_a_resumed_run_is_the_whole_one(name: str, precision: str, tmp_path: Path) -> None:
    def trainer(run: str) -> Trainer:
        overrides = [
            f"run.output_dir={tmp_path}", f"run.name={run}", f"optimizer={BASELINES[name]}", "kfac=null",
            "data.train_limit=512", "train.epochs=3", "schedule={kind: one_cycle, end_epoch: 3}",
            f"train.precision={precision}", "checkpoint={every_epochs: 1, keep: 5}",
        ]  # fmt: skip
        return Trainer(load_config(QUICKSTART, overrides), LocalCommunicator(), torch.device("cpu"))

    whole = trainer("whole")
    whole.train()
    first, *_ = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    resumed = trainer("whole")
    assert resumed.resume(first)
    assert 0 < resumed.iteration < whole.iteration
    resumed.train()
    assert resumed.iteration == whole.iteration
    for ours, theirs in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    if whole.loss_scaler is not None:
        assert resumed.loss_scaler is not None
        assert resumed.loss_scaler.state_dict() == whole.loss_scaler.state_dict()

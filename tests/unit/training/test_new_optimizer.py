"""The recipe of CONTRIBUTING.md for an optimizer: a subclass and a row of the table train a run."""

import json
from pathlib import Path

import pytest
import torch

from kfac_dist.communicator import create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.guards import broadcast_model, check_arguments
from kfac_dist.optim.step_report import StepReport
from kfac_dist.training.build import OPTIMIZERS
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART


class SignSGD(DistributedOptimizer):
    """Moves each weight by the learning rate against the sign of its averaged gradient."""

    def __init__(self, model, communicator=None, *, lr=0.01):
        self.communicator = check_arguments("SignSGD", model, communicator)
        super().__init__(model.parameters(), {"lr": lr})
        broadcast_model(model, self.communicator)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self.communicator.all_reduce_(parameter.grad, "mean")
                parameter.sub_(gradient.sign(), alpha=group["lr"])
        self.report = StepReport()

    def describe(self):
        return ["signs only"]


def test_a_subclass_and_a_row_train_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    def create(config, parts):
        made.append(SignSGD(parts.model, parts.communicator, lr=config.optimizer.learning_rate))
        return made[-1]

    monkeypatch.setitem(OPTIMIZERS, "sgd", create)
    overrides = [f"run.output_dir={tmp_path}", "run.name=signs", "optimizer.name=sgd", "kfac=null",
                 "optimizer.learning_rate=0.01", "train.epochs=3", "schedule.end_epoch=3"]  # fmt: skip
    trainer = Trainer(load_config(QUICKSTART, overrides), create_communicator("reduce"), torch.device("cpu"))
    with caplog.at_level("INFO"):
        trainer.train()
    assert trainer.optimizer is made[0]
    assert "signs only" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "signs" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] / 2
    assert made[0].param_groups[0]["lr"] < 0.01, "the trainer sets the schedule's learning rate"

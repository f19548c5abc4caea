"""Training in half precision on the CPU: as good as in fp32, and overflows skip an update but end nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kfac_dist.commands.train
import kfac_dist.training.learner
import kfac_dist.training.trainer
from kfac_dist import LossScaler
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Batch
from tests.paths import QUICKSTART

Command = Callable[..., Any]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_quickstart_in_half_precision_is_as_accurate(precision: str, command: Command, tmp_path: Path) -> None:
    finished = command(QUICKSTART, f"train.precision={precision}", f"run.output_dir={tmp_path}")
    assert finished.code == 0, finished.err
    *_, summary = records(tmp_path / "quickstart")
    assert 98.5 <= summary["top1"] <= 100  # fp32: 99.2 to 99.7 on three seeds; one image is 0.28
    assert summary["skipped_updates"] == 0


@pytest.mark.parametrize("optimizer", ["kfac", "sgd"])
def test_overflows_skip_updates_and_training_goes_on(
    optimizer: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []

    class Spied(kfac_dist.training.trainer.Trainer):
        def train(self) -> Any:
            trainers.append(self)
            return super().train()

    monkeypatch.setattr(kfac_dist.training.learner, "LossScaler", partial(LossScaler, 2.0**24))
    monkeypatch.setattr(kfac_dist.commands.train, "Trainer", Spied)
    sgd = ["optimizer.name=sgd", "kfac=null", "weight_rescaling=off", "optimizer.learning_rate=0.05"]
    overrides = ["train.precision=fp16", "train.epochs=3", f"run.output_dir={tmp_path}"]
    finished = command(QUICKSTART, *overrides, *(sgd if optimizer == "sgd" else []))
    assert finished.code == 0, finished.err
    lines = records(tmp_path / "quickstart")
    overflows = [line for line in lines if line.get("event") == "overflow"]
    assert len(overflows) >= 2, "a scale of 2^24 is too large for fp16"
    assert [line["loss_scale"] for line in overflows] == [2.0 ** (24 - number) for number in range(len(overflows))]
    train = {line["iteration"]: line for line in lines if line["kind"] == "train"}
    assert [train[line["iteration"]]["loss_scale"] for line in overflows] == [line["loss_scale"] for line in overflows]
    assert lines[-1]["skipped_updates"] == len(overflows)
    assert 50 < lines[-1]["top1"] <= 100
    (trainer,) = trainers
    assert trainer.loss_scaler.factor == 2 * trainer.loss_scaler.scale, "this rank has two slots"
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def test_an_overflow_in_the_forward_pass_leaves_no_trace(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes BatchNorm's running statistics NaN before anything can be skipped."""
    trainers = []
    apply = Augmentation.apply

    class Spied(kfac_dist.training.trainer.Trainer):
        def train(self) -> Any:
            trainers.append(self)
            return super().train()

    def huge_once(self: Augmentation, batch: Batch) -> Batch:
        batch = apply(self, batch)
        return replace(batch, images=batch.images * 1e6) if batch.iteration == 5 else batch

    monkeypatch.setattr(kfac_dist.commands.train, "Trainer", Spied)
    monkeypatch.setattr(Augmentation, "apply", huge_once)
    finished = command(QUICKSTART, "train.precision=fp16", "train.epochs=2", f"run.output_dir={tmp_path}")
    assert finished.code == 0, finished.err
    lost = [line for line in records(tmp_path / "quickstart") if line.get("event") == "nonfinite"]
    assert [line["iteration"] for line in lost] == [5]
    assert lost[0]["loss_scale"] == 2.0**16
    (trainer,) = trainers
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def test_training_whose_loss_no_scale_can_help_is_given_up(command: Command, tmp_path: Path) -> None:
    overrides = ["train.precision=fp16", "optimizer.learning_rate=1.0e+30", "weight_rescaling=off"]
    finished = command(QUICKSTART, *overrides, f"run.output_dir={tmp_path}")
    assert finished.code == 3
    assert "training failed: " in finished.err
    assert "black_box.json has the last iterations" in finished.err
    lines = records(tmp_path / "quickstart")
    assert sum(line.get("event") == "nonfinite" for line in lines) == 3  # no scale helps a loss that is not finite
    assert not (tmp_path / "quickstart" / "DONE").exists()


def test_a_deterministic_run_repeats_itself(command: Command, tmp_path: Path) -> None:
    losses = []
    try:
        for name in ("one", "two"):
            overrides = ["train.precision=bf16", "train.epochs=1", "run.deterministic=true"]
            finished = command(QUICKSTART, *overrides, f"run.output_dir={tmp_path}", f"run.name={name}")
            assert finished.code == 0, finished.err
            assert torch.are_deterministic_algorithms_enabled()
            losses.append([line["loss"] for line in records(tmp_path / name) if line["kind"] == "train"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(losses[0]) > 5
    assert losses[0] == losses[1]


def test_nccl_without_a_gpu_is_refused(command: Command, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finished = command(QUICKSTART, "communication.backend=nccl", f"run.output_dir={tmp_path}")
    assert finished.code == 2
    assert "communication.backend=nccl needs a GPU of its own for every rank, but no rank has one" in finished.err
    assert not (tmp_path / "quickstart").exists()

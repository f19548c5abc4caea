"""Losses that are not finite: skipped, counted, and after several in a row the run goes back to a checkpoint."""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")  # a machine with a GPU may have little else installed
pytest.importorskip("sklearn")

from kfac_dist import create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Batch
from kfac_dist.errors import TrainingFailed
from kfac_dist.training.run_state import RunSaver
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

SGD = ("optimizer.name=sgd", "kfac=null")
BASES = {
    "fp32": (),
    "fp64": ("train.precision=fp64",),
    "bf16": ("train.precision=bf16",),
    "fp16": ("train.precision=fp16",),
    "sgd": SGD,
    "average": ("kfac.ema_decay=0.9", "kfac.refresh={schedule: every, interval: 2}"),
}
Spoil = Callable[[Callable[[int, int], bool]], list[int]]
Make = Callable[..., Trainer]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A trainer of 12 iterations; on a GPU the host looks at each while the next one is done."""
    device = torch.device(request.param)

    def make(*overrides: str) -> Trainer:
        settings = ["train.epochs=1", "batch={global_size: 128, per_rank: 128}", f"run.output_dir={tmp_path}"]
        return Trainer(
            load_config(QUICKSTART, [*settings, *overrides]), create_communicator("reduce", "mpi", device), device
        )

    return make


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """``spoil(when)``: a batch becomes NaN where `when(its iteration, its number in the process)`; returns those."""

    def install(when: Callable[[int, int], bool]) -> list[int]:
        apply, spoilt, count = Augmentation.apply, [], 0

        def faulty(self: Augmentation, batch: Batch) -> Batch:
            nonlocal count
            count += 1
            batch = apply(self, batch)
            if not when(batch.iteration, count - 1):
                return batch
            spoilt.append(batch.iteration)
            return replace(batch, images=batch.images * math.nan)

        monkeypatch.setattr(Augmentation, "apply", faulty)
        return spoilt

    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    return install


def records(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("base", BASES)
def test_one_is_skipped(make: Make, base: str, spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, momentum, BatchNorm statistics and the running Fisher stay as they were."""
    spoil(lambda iteration, _: iteration == 5)
    trainer = make(*BASES[base])
    states = []
    train_iteration = Trainer._train_iteration

    def look(self: Trainer, iteration: int, *arguments: Any) -> Any:
        states.append(_snapshot(self))
        return train_iteration(self, iteration, *arguments)

    monkeypatch.setattr(Trainer, "_train_iteration", look)
    trainer.train()
    assert len(states) == 12
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        same = [torch.equal(one, two) for one, two in zip(before, after, strict=False)]
        assert all(same) == (number == 5), number
    (event,) = [event for event in records(tmp_path, "event") if event["event"] != "retry"]
    assert (event["iteration"], event["event"], event["loss"]) == (5, "nonfinite", "NaN")
    (summary,) = records(tmp_path, "summary")
    assert (summary["nonfinite_updates"], summary["restores"]) == (1, 0)
    assert summary["top1"] > 50


def _snapshot(trainer: Trainer) -> list[torch.Tensor]:
    counted = "num_batches_tracked"  # counts passes, has no effect
    values = [value for name, value in trainer.model.state_dict().items() if not name.endswith(counted)]
    optimizer = trainer.optimizer.state_dict()
    values += [state["momentum_buffer"] for state in optimizer["state"].values()]
    blocks = optimizer.get("kfac", {}).get("blocks", {})
    values += [matrix for block in blocks.values() for matrix in block["running"].values()]
    return [value.clone() for value in values]


@pytest.mark.parametrize("extra", [(), ("train.precision=fp16",), SGD], ids=["fp32", "fp16", "sgd"])
def test_three_in_a_row_go_back_to_the_checkpoint(
    make: Make, extra: tuple[str, ...], spoil: Spoil, tmp_path: Path
) -> None:
    """Whatever it was is gone the second time."""
    spoil(lambda _, number: number in (6, 7, 8))
    make("checkpoint={every_epochs: 0.4}", *extra).train()
    train = records(tmp_path, "train")
    assert [record["iteration"] for record in train] == list(range(12))
    assert all(math.isfinite(float(record["loss"])) for record in train)
    if extra != SGD:
        expected = load_config(QUICKSTART).kfac
        assert expected is not None
        assert train[4]["damping"] < expected.damping.initial
        assert train[5]["damping"] > 2 * expected.damping.initial, "ten times the schedule's"
    (restored,) = [event for event in records(tmp_path, "event") if event["event"] == "restored"]
    assert (restored["iteration"], restored["failed_at"], restored["num_restores"]) == (5, 8, 1)
    (summary,) = records(tmp_path, "summary")
    assert (summary["nonfinite_updates"], summary["restores"]) == (3, 1)


@pytest.mark.parametrize(
    ("program", "replay"), [("train.py", "python train.py"), ("/somewhere/bin/kfac-dist", "kfac-dist train")]
)
def test_if_that_does_not_help_it_ends_with_a_black_box(
    make: Make, program: str, replay: str, spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program])
    spoilt = spoil(lambda iteration, _: iteration >= 5)
    trainer = make("checkpoint={every_epochs: 0.4}", "train.max_restores=1", "train.max_nonfinite=2")
    with pytest.raises(TrainingFailed, match=r"2 updates in a row, after one restart .* more damping.*black_box\.json"):
        trainer.train()
    looked_at = [5, 6]
    begun = looked_at if trainer.device.type == "cpu" else [5, 6, 7]
    assert spoilt == begun * 2
    run = tmp_path / "quickstart"
    assert not (run / "DONE").exists()
    box = json.loads((run / "black_box.json").read_text())
    checkpoint = run / "checkpoints" / "iteration-00000005"
    assert box["replay"] == f"{replay} {run / 'config.yaml'} --resume {checkpoint}"
    assert checkpoint.is_dir()
    assert (box["iteration"], box["num_restores"]) == (6, 1)
    assert [kept["iteration"] for kept in box["iterations"]] == begun
    for kept in box["iterations"]:
        assert set(kept["weight_norms"]) == {name for name, _ in trainer.model.named_parameters()}
        assert all(value > 0 for name, value in kept["weight_norms"].items() if name.endswith("weight"))
    assert box["iterations"][1]["rank_0_gradient_norms"]["0.weight"] == "nan"
    (rank,) = box["nonfinite_slots"]
    assert rank["rank"] == 0
    slots = [(slot["iteration"], slot["slot"], slot["loss"]) for slot in rank["slots"]]
    assert slots == [(iteration, 0, "nan") for iteration in begun]
    assert rank["slots"][0]["images"] == trainer.sampler.indices(5, 0).tolist()
    assert box["factors"]["0 A"]["mean_diagonal"] > 0


def test_without_a_checkpoint_it_ends_at_once(make: Make, spoil: Spoil, tmp_path: Path) -> None:
    spoil(lambda iteration, _: iteration >= 2)
    with pytest.raises(TrainingFailed, match=r"loss is nan at iteration 4 .*3 updates in a row, after no restart"):
        make().train()
    assert json.loads((tmp_path / "quickstart" / "black_box.json").read_text())["replay"].endswith("config.yaml")


def test_a_loss_that_is_not_finite_at_the_end_is_no_success(make: Make, spoil: Spoil, tmp_path: Path) -> None:
    spoil(lambda iteration, _: iteration == 11)
    with pytest.raises(TrainingFailed, match="loss is nan at iteration 11"):
        make().train()


def test_an_overflow_at_the_end_costs_that_update_alone(make: Make, spoil: Spoil, tmp_path: Path) -> None:
    """Defect: in fp16 the run was finished, and its weights nowhere."""
    spoil(lambda iteration, _: iteration == 11)
    make("train.precision=fp16").train()
    assert (tmp_path / "quickstart/DONE").exists()
    assert (tmp_path / "quickstart/checkpoints/iteration-00000012/model.safetensors").exists()


def test_weights_that_the_last_update_spoils_are_no_matter_of_room(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Defect: the message told to make room on the disk."""
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    trainer = make()
    step = trainer.optimizer.step

    def faulty(*arguments: Any) -> Any:
        result = step(*arguments)
        if trainer.iteration == 11:
            next(trainer.model.parameters()).data.fill_(math.inf)
        return result

    monkeypatch.setattr(trainer.optimizer, "step", faulty)
    with pytest.raises(TrainingFailed, match=r"a warning above or in its log\.txt says why"):
        trainer.train()
    assert "weight is not finite" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    trainer = make("checkpoint={every_epochs: 0.4}")
    step = trainer.optimizer.step

    def faulty(*arguments: Any) -> Any:
        result = step(*arguments)
        if trainer.iteration == 8:  # the last before a checkpoint
            next(trainer.model.parameters()).data.fill_(math.inf)
        return result

    monkeypatch.setattr(trainer.optimizer, "step", faulty)
    with pytest.raises(TrainingFailed):
        trainer.train()
    folders = sorted(path.name for path in (tmp_path / "quickstart" / "checkpoints").iterdir())
    assert folders == ["iteration-00000005"]
    box = json.loads((tmp_path / "quickstart" / "black_box.json").read_text())
    assert box["replay"].endswith("iteration-00000005")


def test_an_update_that_was_skipped_meanwhile_is_not_saved_by_the_clock(
    make: Make, spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: on a GPU it was, as whether the newest loss is finite was looked at too late."""
    spoil(lambda iteration, _: iteration == 7)
    trainer = make("checkpoint={every_minutes: 1}")
    monkeypatch.setattr(RunSaver, "wants_save", property(lambda saver: trainer.iteration == 6))
    trainer.train()
    folders = sorted(path.name for path in (tmp_path / "quickstart" / "checkpoints").iterdir())
    assert folders == [f"iteration-{number:08}" for number in ([7, 12] if trainer.device.type == "cpu" else [12])]


def test_an_overflow_without_a_scale_is_told_with_its_iteration(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: on a GPU with the number and the loss of the iteration before."""
    trainer = make("train.precision=fp16")
    assert trainer.loss_scaler is not None
    trainer.loss_scaler.scale = 1.0
    scale_loss = trainer.loss_scaler.scale_loss
    monkeypatch.setattr(
        trainer.loss_scaler, "scale_loss", lambda loss: scale_loss(loss) * (math.inf if trainer.iteration == 5 else 1)
    )
    with pytest.raises(TrainingFailed, match=r"at iteration 5 .*overflows fp16 even without a loss scale"):
        trainer.train()


@pytest.mark.parametrize("evaluates", ["train.evaluate_every=0.3", "train.evaluate_every=1"])
def test_the_last_iterations_took_their_time(
    make: Make, evaluates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: on a GPU the one before an evaluation was reported right after the one before it, as if in no time."""
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")
    train_iteration = Trainer._train_iteration

    def slow(self: Trainer, *arguments: Any) -> Any:
        time.sleep(0.1)
        return train_iteration(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_iteration", slow)
    make(evaluates).train()
    rates = [record["images_per_second"] for record in records(tmp_path, "train")]
    assert len(rates) == 12
    assert max(rates) < 128 / 0.1, rates

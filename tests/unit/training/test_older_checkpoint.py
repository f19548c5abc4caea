"""Going on from a checkpoint that is not the newest: what was saved after it belongs to a future that is given up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")  # a machine with a GPU may have little else installed
pytest.importorskip("sklearn")

from kfac_dist import create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.runs.reader import read_metrics
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A trainer of 36 iterations that saves after 12, 23 and 34 of them, and at the end."""

    def make(*overrides: str) -> Trainer:
        settings = ["train.epochs=3", "schedule.end_epoch=3", "checkpoint={every_epochs: 1, keep: 9}"]
        config = load_config(QUICKSTART, [*settings, f"run.output_dir={tmp_path}", *overrides])
        return Trainer(config, create_communicator("reduce", "mpi", torch.device("cpu")), torch.device("cpu"))

    return make


def resume(trainer: Trainer, place: Path) -> None:
    """Resume, and end before anything is trained."""
    assert trainer.resume(place)
    assert trainer.resumed is not None
    assert trainer.resumed.lock is not None
    trainer.resumed.lock.release()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_later_checkpoints_are_set_aside(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "quickstart"
    make().train()
    before = names(run)
    first, *later = before
    whole = read_metrics(run)
    resume(make(), run / "checkpoints" / first)
    assert names(run) == sorted([first, *(f"unused-{name}" for name in later)])
    assert f"set aside, as {run / 'checkpoints' / f'unused-{later[-1]}'}: delete it" in caplog.text

    part = make()
    assert part.resume(run)  # as --resume auto, after a stop before anything was saved
    part.train()
    assert set(before) < set(names(run))
    losses = [
        [record["loss"] for record in records if record["kind"] == "train"] for records in (whole, read_metrics(run))
    ]
    assert losses[0] == losses[1]


def test_what_was_set_aside_before_stays(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    make().train()
    first, second, *_ = names(run)
    (run / "checkpoints" / f"unused-{second}").mkdir()
    resume(make(), run / "checkpoints" / first)
    assert {f"unused-{second}", f"unused-{second}-2"} < set(names(run))

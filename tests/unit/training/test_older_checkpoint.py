"""Going on from a checkpoint that is not the newest: what was saved after it belongs to a future that is given up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")  # a machine with a GPU may have little else installed
pytest.importorskip("sklearn")

from kfac_dist import create_communicator
from kfac_dist.checkpoints.store import CheckpointStore
from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from kfac_dist.runs.reader import read_metrics
from kfac_dist.training.run_state import refuse_unusable
from kfac_dist.training.trainer import Trainer
from tests.paths import QUICKSTART

Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A trainer of three iterations that saves after each."""

    def make() -> Trainer:
        settings = ["train.epochs=3", "data.train_limit=128", "data.eval_limit=32", f"run.output_dir={tmp_path}"]
        config = load_config(QUICKSTART, [*settings, "checkpoint={every_epochs: 1, keep: 9}"])
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


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name in ("iteration-00000009", "iteration-00000010", "iteration-100000000", "unused-iteration-00000010"):
        (store.folder / name).mkdir(parents=True)
    moved = store.set_aside_after(9)
    assert [path.name for path in moved] == ["unused-iteration-100000000", "unused-iteration-00000010-2"]
    assert names(tmp_path) == ["iteration-00000009", "unused-iteration-00000010", *sorted(path.name for path in moved)]


def test_a_run_of_which_no_checkpoint_can_be_used_is_not_begun_anew(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    make().train()
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{")
    for place in (run, next((run / "checkpoints").iterdir())):
        trainer = make()
        assert not trainer.resume(place)
        with pytest.raises(InputError, match="has no checkpoint that can be used"):
            refuse_unusable(place, trainer.communicator)
    refuse_unusable(tmp_path, make().communicator)

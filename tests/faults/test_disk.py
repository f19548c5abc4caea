"""Checkpoints that cannot be written, and what goes wrong on one rank only: the run goes on, or ends by name."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.faults.conftest import assert_same, records

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]
Whole = Callable[[int], Path]


@pytest.mark.parametrize(
    "fault",
    [
        "raise:1:kfac_dist.checkpoints.save.write_shard:2",
        "full:0:kfac_dist.checkpoints.save.write_tensors:2",
        "full:0:kfac_dist.checkpoints.store.CheckpointStore.commit:2",
    ],
)
def test_the_writers_thread_fails_once(fault: str, train: Run, whole_run: Whole, tmp_path: Path) -> None:
    finished = train(2, "run", fault=fault)
    assert finished.returncode == 0, finished.stderr
    assert "a checkpoint could not be written, training goes on" in finished.stderr + _log(tmp_path / "run")
    assert_same(whole_run(2), tmp_path / "run")
    failed = [event for event in records(tmp_path / "run", "event") if event["event"] == "checkpoint_failed"]
    assert [event["failed"] for event in failed] == [1]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing is left half written"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints, 830 KB each, but not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(train: Run, whole_run: Whole, small_disk: Path) -> None:
    settings = [f"run.output_dir={small_disk}", "checkpoint={every_epochs: 0.2, keep: 9}"]
    finished = train(2, "run", *settings)
    assert finished.returncode == 3, finished.stderr
    assert "its last checkpoint could not be written" in finished.stderr
    assert not (small_disk / "run" / "DONE").exists(), "the weights are nowhere"
    failed = [event for event in records(small_disk / "run", "event") if event["event"] == "checkpoint_failed"]
    assert failed
    assert "No space left on device" in finished.stderr + _log(small_disk / "run")
    kept = list((small_disk / "run" / "checkpoints").iterdir())
    assert kept
    assert all(path.name.startswith("iteration-") for path in kept)
    for path in kept:
        manifest = json.loads((path / "manifest.json").read_text())
        assert all((path / name).stat().st_size == file["size"] for name, file in manifest["files"].items())
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    finished = train(2, "run", *settings, "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    assert_same(whole_run(2), small_disk / "run")


def test_nan_on_one_rank_is_skipped_on_all(train: Run, tmp_path: Path) -> None:
    finished = train(2, "run", fault="nan:1:kfac_dist.data.augment.Augmentation.apply:30")  # 4 slots an iteration
    assert finished.returncode == 0, finished.stderr
    (event,) = [event for event in records(tmp_path / "run", "event") if event["event"] == "nonfinite"]
    assert event["iteration"] == 7
    (summary,) = records(tmp_path / "run", "summary")
    assert summary["nonfinite_updates"] == 1
    assert summary["top1"] > 50


def test_an_indefinite_factor_is_damped_and_counted(train: Run, tmp_path: Path) -> None:
    finished = train(2, "run", fault="negative:1:kfac_dist.optim.distributed_fisher.unpack_symmetric:1")
    assert finished.returncode == 0, finished.stderr
    retries = [event for event in records(tmp_path / "run", "event") if event["event"] == "retry"]
    assert retries
    assert records(tmp_path / "run", "summary")[0]["top1"] > 50


def _log(run: Path) -> str:
    return (run / "log.txt").read_text()

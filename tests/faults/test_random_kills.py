"""One run that is killed sixty times: at random moments, and within its saves."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.faults.conftest import assert_same, records

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

ITERATION = "kfac_dist.training.trainer.Trainer._train_iteration"
SAVING = (
    "kfac_dist.checkpoints.save.write_shard",
    "kfac_dist.checkpoints.save.write_tensors",
    "os.fsync",
    "pathlib.Path.rename",
    "kfac_dist.checkpoints.store.sync_folder",
    "kfac_dist.checkpoints.store.CheckpointStore.commit",
    "kfac_dist.checkpoints.store.CheckpointStore.prune",
    "shutil.rmtree",
)
"""What a save calls: open and write, sync, rename, delete. Rank 1 only has a shard to write."""
LENGTH = ("train.epochs={}", "schedule.end_epoch={}", "train.evaluate_every=20")


def faults(num_random: int, num_saving: int, seed: int) -> Iterator[str]:
    """Kills of either rank in turn, in random order."""
    draw = random.Random(seed)
    kinds = ["random"] * num_random + ["saving"] * num_saving
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        rank = number % 2
        if kind == "random":
            yield f"kill+{draw.uniform(0.0, 0.6):.3f}:{rank}:{ITERATION}:{draw.randint(1, 12)}"
        else:
            where = draw.choice(SAVING if rank == 0 else SAVING[:1] + SAVING[2:4])
            yield f"kill:{rank}:{where}:{draw.randint(8, 24)}"


def kill_and_resume(train: Run, tmp_path: Path, epochs: int, num_random: int, num_saving: int, seed: int) -> None:
    length = tuple(text.format(epochs) for text in LENGTH)
    assert train(2, "whole", *length, timeout=1200).returncode == 0
    kills = 0
    for fault in faults(num_random, num_saving, seed):
        killed = train(2, "part", "--resume", "auto", *length, fault=fault, timeout=300)
        assert "fault: " in killed.stdout, f"{fault}: the run ended before it, after {kills} kills: {killed.stderr}"
        assert killed.returncode not in (0, 2, 3, 93), f"{fault}: {killed.returncode} {killed.stderr}"
        kills += 1
        # A kill before the first checkpoint leaves nothing to go on with: the next start is a new run.
        if not list((tmp_path / "part" / "checkpoints").glob("iteration-*")):
            shutil.rmtree(tmp_path / "part")
    resumed = train(2, "part", "--resume", "auto", *length, timeout=1200)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / "whole", tmp_path / "part")
    assert not list((tmp_path / "part" / "checkpoints").glob(".*"))
    resumes = (tmp_path / "part" / "log.txt").read_text().count("resumed at iteration")
    assert {record["ranks"] for record in records(tmp_path / "part", "event")} == {2}
    print(f"{kills} kills, {resumes} resumes, {len(records(tmp_path / 'part'))} iterations")


def test_two_kills(train: Run, tmp_path: Path) -> None:
    kill_and_resume(train, tmp_path, epochs=8, num_random=1, num_saving=1, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_sixty_kills(train: Run, tmp_path: Path) -> None:
    """40 at random moments, 20 in a save."""
    kill_and_resume(train, tmp_path, epochs=300, num_random=40, num_saving=20, seed=0)

"""A job that gets nowhere says where each rank is, and ends; one that is only slow goes on."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

ITERATION = "kfac_dist.training.trainer.Trainer._train_iteration"
ALL_REDUCE = "kfac_dist.communicator.mpi.MpiCommunicator.all_reduce_"


def test_a_stopped_rank(train: Run, tmp_path: Path) -> None:
    ended = train(2, "run", "run.watchdog_minutes=0.05", fault=f"SIGSTOP:1:{ITERATION}:6")
    assert ended.returncode not in (0, 75)
    said = "watchdog: rank 0 has made no progress for 3 s (run.watchdog_minutes): training, iteration 5, stage"
    log = (tmp_path / "run" / "log.txt").read_text()
    for text in (ended.stderr, log):
        assert said in text
        assert "rank 1 has made no progress" not in text  # it cannot say so
        assert "in _train_iteration" in text, "the stack of the main thread"
    assert "rank 0 ERROR watchdog" in log
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_rank_that_skips_a_collective(train: Run, tmp_path: Path) -> None:
    """Every later collective then meets another one, until one rank waits for a partner that never comes."""
    ended = train(2, "run", "run.watchdog_minutes=0.05", fault=f"skip:1:{ALL_REDUCE}:40")
    assert ended.returncode not in (0, 75)
    assert not (tmp_path / "run" / "DONE").exists()
    if "watchdog" in ended.stderr:  # rather than an error of MPI's for messages of different lengths
        for rank in (0, 1):
            assert f"watchdog: rank {rank} has made no progress" in ended.stderr


def test_a_rank_that_never_comes_to_a_collective(train: Run, tmp_path: Path) -> None:
    ended = train(2, "run", "run.watchdog_minutes=0.05", fault=f"sleep:1:{ALL_REDUCE}:40")
    assert ended.returncode not in (0, 75)
    for text in (ended.stderr, (tmp_path / "run" / "log.txt").read_text()):
        for rank in (0, 1):
            assert f"watchdog: rank {rank} has made no progress" in text
        assert text.count("in all_reduce_") >= 1


def test_a_straggler_is_waited_for(train: Run, tmp_path: Path) -> None:
    """Ten times slower than the others, 0.3 s an iteration; the watchdog allows 1.8 s, and the run takes 6 s."""
    finished = train(2, "run", "run.watchdog_minutes=0.03", fault=f"slow:1:{ITERATION}:1+")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("fault: ") == 20
    assert (tmp_path / "run" / "DONE").exists()

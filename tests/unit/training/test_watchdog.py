"""The watchdog ends what stands still, and only that."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_dist.runs.log import RunLog
from kfac_dist.timing import StageTimer
from kfac_dist.training.watchdog import Watchdog

LIMIT = 0.3  # seconds


@pytest.fixture(autouse=True)
def not_ended() -> Iterator[None]:
    """The watchdog's last resort, where a job would not end, would end the tests some seconds later."""
    yield
    faulthandler.cancel_dump_traceback_later()


class Job:
    """Something to watch; `ended` has the exit codes."""

    def __init__(self, log: RunLog | None = None, minutes: float | None = LIMIT / 60) -> None:
        self.iteration = 3
        self.timer = StageTimer()
        self.ended: list[int] = []
        self.watchdog = Watchdog(minutes, 1, self.timer, lambda: self.iteration, log, self.ended.append)

    def work(self, seconds: float, progress: str) -> None:
        end = time.monotonic() + seconds
        with self.watchdog:
            while time.monotonic() < end and not self.ended:
                time.sleep(LIMIT / 6)
                if progress == "iterations":
                    self.iteration += 1
                elif progress == "stages":
                    with self.timer.stage("forward"):
                        pass
                elif progress == "beats":
                    self.watchdog.beat()


@pytest.mark.parametrize("progress", ["iterations", "stages", "beats"])
def test_any_progress_will_do(progress: str) -> None:
    job = Job()
    job.work(4 * LIMIT, progress)
    assert job.ended == []


def test_none_ends_the_job_with_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(1)
    log.open(tmp_path)
    job = Job(log)
    with job.timer.stage("backward"):
        job.work(20, "none")
    log.close()
    assert job.ended == [3]
    for text in (capfd.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert "watchdog: rank 1 has made no progress" in text
        assert "training, iteration 3, stage backward" in text
        assert "in work" in text
    assert "rank 1 ERROR watchdog" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("lost", ["without a reader", "full", "closed"])
def test_it_ends_the_job_where_nothing_can_be_said(lost: str, tmp_path: Path) -> None:
    """Defect: the watchdog's thread died of the write to standard error, and the job hung on."""
    log = RunLog(1)
    log.open(tmp_path)
    job = Job(log)
    job.watchdog.activity = "reading \udcff"  # a file's name
    kept = os.dup(2)
    try:
        if lost == "closed":
            os.close(2)
        else:
            reader, writer = os.pipe() if lost == "without a reader" else (os.dup(2), os.open("/dev/full", os.O_WRONLY))
            os.dup2(writer, 2)
            os.close(reader)
            os.close(writer)
        job.work(20, "none")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    log.close()
    assert job.ended == [3]
    assert "reading \\udcff, iteration 3" in (tmp_path / "log.txt").read_text()


def test_it_can_be_off() -> None:
    job = Job(minutes=None)
    job.work(3 * LIMIT, "none")
    assert job.ended == []


def test_its_thread_ends_with_it() -> None:
    before = threading.active_count()
    job = Job()
    with job.watchdog:
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_suspended_job_is_not_taken_for_a_hanging_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Between two looks an hour has gone by."""
    real, jump = time.monotonic, 0.0
    monkeypatch.setattr("kfac_dist.training.watchdog.time.monotonic", lambda: real() + jump)
    job = Job(minutes=1)
    with job.watchdog:
        time.sleep(0.1)
        jump = 3600.0
        time.sleep(2.5)
    assert "watchdog" not in capfd.readouterr().err
    assert job.ended == []

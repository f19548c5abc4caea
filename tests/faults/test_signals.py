"""Signals, locks and restarts: a run ends in order, is trained by one job only, and not for ever in vain."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from kfac_dist.runs.lock import RunLock
from tests.faults.conftest import assert_same
from tests.paths import QUICKSTART, ROOT

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]
Whole = Callable[[int], Path]

ITERATION = "kfac_dist.training.trainer.Trainer._train_iteration"


def test_sigusr1_to_mpirun_stops_all_ranks(tmp_path: Path) -> None:
    """What a cluster's scheduler sends before the time limit."""
    command = [ROOT / "scripts/mpirun.sh", "-n", "2", sys.executable, ROOT / "train.py", QUICKSTART]
    overrides = [f"run.output_dir={tmp_path}", "train.epochs=600", "schedule.end_epoch=600"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "KFAC_DIST_PROGRESS": "off"}
    with subprocess.Popen([*command, *overrides], env=env, stderr=subprocess.PIPE, text=True) as job:
        metrics = tmp_path / "quickstart" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        _, error = job.communicate(timeout=60)
    assert job.returncode == 75, error
    stopped = re.search(r"stopped by a signal at iteration (\d+)", error)
    assert stopped is not None, error
    newest = max((tmp_path / "quickstart" / "checkpoints").glob("iteration-*"))
    assert newest.name == f"iteration-{int(stopped[1]):08d}"


def test_a_signal_during_a_checkpoint(train: Run, whole_run: Whole, tmp_path: Path) -> None:
    stopped = train(2, "part", fault="SIGUSR1:0:kfac_dist.checkpoints.store.CheckpointStore.commit:3")
    assert stopped.returncode == 75, stopped.stderr
    assert train(2, "part", "--resume", "auto").returncode == 0
    assert_same(whole_run(2), tmp_path / "part")


def test_two_different_signals_are_one_stop(train: Run, whole_run: Whole, tmp_path: Path) -> None:
    stopped = train(2, "part", fault=f"SIGTERM:1:{ITERATION}:8;SIGUSR1:0:{ITERATION}:8")
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by a signal at iteration 8" in stopped.stderr
    assert train(2, "part", "--resume", "auto").returncode == 0
    assert_same(whole_run(2), tmp_path / "part")


def test_a_second_interrupt_ends_at_once(train: Run, tmp_path: Path) -> None:
    ended = train(2, "part", fault=f"SIGINT:1:{ITERATION}:8;SIGINT:1:{ITERATION}:8")
    assert ended.returncode == 130, ended.stderr
    assert "interrupted (Ctrl-C)" in ended.stderr
    newest = max((tmp_path / "part" / "checkpoints").glob("iteration-*"))
    assert newest.name < "iteration-00000008", "no checkpoint was made for it"


def test_restarts_without_progress_come_to_an_end(train: Run, whole_run: Whole, tmp_path: Path) -> None:
    crash = f"kill:1:{ITERATION}:2"  # the second iteration after each start
    assert train(2, "part", fault=f"kill:1:{ITERATION}:8").returncode == 137
    for number in (1, 2, 3):
        assert (
            train(2, "part", "--resume", "auto", "checkpoint={every_epochs: 0.5, keep: 3}", fault=crash).returncode
            == 137
        )
        restarts = json.loads((tmp_path / "part" / "restarts.json").read_text())
        assert restarts["restarts"] == number
        assert restarts["iteration"] in (4, 6)  # the newer checkpoint may not have been whole yet at the first death
    refused = train(2, "part", "--resume", "auto")
    assert refused.returncode == 93
    told = f"was restarted 3 times at iteration {restarts['iteration']} and never came as far as its next checkpoint"
    assert told in refused.stderr
    (tmp_path / "part" / "restarts.json").unlink()
    assert train(2, "part", "--resume", "auto").returncode == 0
    assert_same(whole_run(2), tmp_path / "part")


def test_one_job_at_a_time(train: Run, tmp_path: Path) -> None:
    assert train(2, "part", fault=f"SIGUSR1:0:{ITERATION}:5").returncode == 75
    files = {path: path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()}
    lock = RunLock(tmp_path / "part")
    refused = train(2, "part", "--resume", "auto")
    assert refused.returncode == 2
    assert refused.stderr.count("is in use: another job trains this run") == 1
    assert "Traceback" not in refused.stderr
    lock.release()
    assert {path: path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()} == files

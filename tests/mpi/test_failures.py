"""However a rank fails, the whole job ends soon, non-zero, and tells it once."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import scipy.io

from tests.paths import QUICKSTART

pytestmark = pytest.mark.mpi


Run = Callable[..., CompletedProcess[str]]


def seconds_since_failure(finished: CompletedProcess[str]) -> float:
    found = re.search(r"failing at ([\d.]+)", finished.stdout)
    assert found, f"the failure was never reached:\n{finished.stdout}\n{finished.stderr}"
    return time.time() - float(found[1])


@pytest.mark.parametrize(
    ("way", "code", "report", "tracebacks"),
    [
        ("exception", 3, "RuntimeError: injected failure: disk on fire", 1),
        ("exit 5", 5, "SystemExit: 5", 1),
        ("exit 0", 1, "SystemExit: 0", 1),
        ("input error", 2, "error: injected failure: image 7 cannot be read", 0),
        ("full disk", 3, "training failed: cannot write metrics.jsonl in ", 0),
        ("Ctrl-C", 130, "interrupted (Ctrl-C)", 0),
        ("missing package", 3, "ModuleNotFoundError: No module named 'yaml'", 1),
    ],
)
def test_one_rank_fails(way: str, code: int, report: str, tracebacks: int, run_program: Run, tmp_path: Path) -> None:
    finished = run_program(2, "failing_rank.py", way, QUICKSTART, f"run.output_dir={tmp_path}")
    assert seconds_since_failure(finished) < 10
    assert finished.returncode == code
    assert finished.stderr.count(report) == 1
    assert finished.stderr.count("Traceback (most recent call last)") == tracebacks
    assert not list(tmp_path.rglob("DONE"))


def test_folder_missing_on_one_rank(run_program: Run, tmp_path: Path) -> None:
    for name in ("train_32x32.mat", "test_32x32.mat"):
        pixels = {"X": np.zeros((32, 32, 3, 8), dtype=np.uint8), "y": np.ones((8, 1), dtype=np.uint8)}
        scipy.io.savemat(tmp_path / name, pixels)
    overrides = ["data.name=svhn", f"data.root={tmp_path}", f"run.output_dir={tmp_path / 'runs'}"]
    finished = run_program(2, "failing_rank.py", "missing folder", QUICKSTART, *overrides)
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == 1
    assert "/nonexistent/svhn" in finished.stderr
    assert "(on rank 1 of 2)" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "runs").exists()


def test_another_configuration_on_one_rank(run_program: Run, tmp_path: Path) -> None:
    finished = run_program(2, "failing_rank.py", "other configuration", QUICKSTART, f"run.output_dir={tmp_path}")
    assert finished.returncode == 2
    assert finished.stderr.count("all ranks must have the same configuration, but rank 1's (+) differs") == 1
    assert "+train: {epochs: 7" in finished.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_configuration_error_is_printed_once(mpirun: Run) -> None:
    finished = mpirun(3, ["train.py", QUICKSTART, "kfac.damping.target=-1", "run.sed=3"], timeout=120)
    assert finished.returncode == 2
    assert finished.stderr.count("error: ") == 1
    assert finished.stderr.count("kfac.damping.target must be > 0, got -1") == 1
    assert finished.stderr.count("run.sed is not a known key") == 1
    assert "Traceback" not in finished.stderr


def test_divergence(mpirun: Run, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1.0e+38", "weight_rescaling=off", f"run.output_dir={tmp_path}"]
    finished = mpirun(2, ["train.py", QUICKSTART, *overrides], timeout=120)
    assert finished.returncode == 3, finished.stderr
    assert finished.stderr.count("training failed: the training loss is nan at iteration") == 1
    assert "Traceback" not in finished.stderr
    assert (tmp_path / "quickstart" / "metrics.jsonl").is_file()
    assert not (tmp_path / "quickstart" / "DONE").exists()

"""A long run neither opens more files, nor starts more threads, nor takes more memory."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.paths import QUICKSTART, ROOT

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

WARM_UP = 60
RANKS = 2


def soak(mpirun: Run, folder: Path, epochs: int, growth: float) -> None:
    program = ROOT / "tests/faults/programs/soak.py"
    env = {"PYTHONPATH": str(ROOT), "KFAC_DIST_PROGRESS": "off"}
    ended = mpirun(RANKS, [program, QUICKSTART, str(epochs), folder], env=env, timeout=20 + 10 * epochs)
    assert ended.returncode == 0, ended.stderr
    for rank in range(RANKS):
        found = json.loads((folder / f"rank-{rank}.json").read_text())
        assert len(found) == -(-epochs * 1438 // 128)
        files, threads, memory = ([row[column] for row in found[WARM_UP:]] for column in range(3))
        last = slice(-len(files) // 4, None)
        # The least: some iterations find a checkpoint being written.
        assert min(files[last]) <= min(files[: len(files) // 4])
        assert min(threads[last]) <= min(threads[: len(threads) // 4])
        early, late = max(memory[: len(memory) // 4]), max(memory[last])
        print(f"rank {rank}, {len(found)} iterations: memory {early / 1e6:.1f} to {late / 1e6:.1f} MB")
        assert late - early < growth


def test_300_iterations(mpirun: Run, tmp_path: Path) -> None:
    soak(mpirun, tmp_path, 27, 8e6)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_5000_iterations(mpirun: Run, tmp_path: Path) -> None:
    soak(mpirun, tmp_path, 450, 16e6)

"""How these tests start their programs."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import CHECKOUT_PATH, run_limited

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def run_program(mpirun: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    """``run_program(n, name, *args, timeout=120)`` runs a program of ``programs/`` on n ranks."""

    def run(num_ranks: int, name: str, *args: str | Path, timeout: float = 120) -> CompletedProcess[str]:
        env = {"PYTHONPATH": CHECKOUT_PATH, "KFAC_DIST_PROGRESS": "off"}
        return mpirun(num_ranks, [HERE / "programs" / name, *args], env=env, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., CompletedProcess[str]]:
    """``torchrun(n, script, *args, timeout=120)`` runs a script on n ranks, which know nothing of MPI."""

    def run(num_ranks: int, script: Path, *args: str | Path, timeout: float = 120) -> CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        env = {"PYTHONPATH": CHECKOUT_PATH, "KFAC_DIST_PROGRESS": "off"}
        return run_limited([sys.executable, *launcher, script, *args], env, timeout)

    return run

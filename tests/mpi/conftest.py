"""How these tests start their programs."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def run_program(mpirun: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    """``run_program(n, name, *args, timeout=120)`` runs a program of ``programs/`` on n ranks."""

    def run(num_ranks: int, name: str, *args: str | Path, timeout: float = 120) -> CompletedProcess[str]:
        # A program's own folder leads its sys.path, not the checkout.
        env = {"PYTHONPATH": str(ROOT), "KFAC_DIST_PROGRESS": "off"}
        return mpirun(num_ranks, [HERE / "programs" / name, *args], env=env, timeout=timeout)

    return run

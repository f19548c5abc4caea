"""The collectives over real MPI."""

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_collectives(num_ranks: int, run_program: Callable[..., CompletedProcess[str]]) -> None:
    finished = run_program(num_ranks, "communicator_checks.py", str(num_ranks))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"10 checks passed on {num_ranks} ranks" in finished.stdout

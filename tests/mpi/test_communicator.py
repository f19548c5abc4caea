"""The collectives over real MPI, and how long the choice of ReduceScatterV's algorithm may take."""

import re
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_collectives(num_ranks: int, run_program: Callable[..., CompletedProcess[str]]) -> None:
    finished = run_program(num_ranks, "communicator_checks.py", str(num_ranks))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"11 checks passed on {num_ranks} ranks" in finished.stdout


@pytest.mark.parametrize(
    ("case", "num_calls", "limit_seconds"),
    [
        # One call on the smallest buffer tells enough of what is slow. The rest is for a busy machine.
        ("slow_call", (5, 15), 1.0 + 0.5 + 2.0),
        ("slow_all", (2, 3), 1.0 + 0.5 + 2.0),
        ("slow_clock", (0, 0), 2.0),
    ],
)
def test_measurement_is_bounded(
    case: str, num_calls: tuple[int, int], limit_seconds: float, run_program: Callable[..., CompletedProcess[str]]
) -> None:
    """Defect: every algorithm was called four times on 8 MiB, however long that took."""
    finished = run_program(2, "measure_cases.py", case)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    matched = re.fullmatch(rf"{case}: ([\d.]+) s, (\w+) after ([\w,]*)\n", finished.stdout)
    assert matched, finished.stdout
    calls = matched[3].split(",") if matched[3] else []
    assert num_calls[0] <= len(calls) <= num_calls[1], calls
    assert float(matched[1]) < limit_seconds
    if case == "slow_call":
        assert calls.count("native") == 1
        assert matched[2] != "native"

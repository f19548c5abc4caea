"""What the launcher's environment promises is checked against the ranks that there are."""

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from kfac_dist.communicator import launch
from kfac_dist.errors import InputError

OPT_OUT = "KFAC_DIST_ALLOW_SIZE_MISMATCH"


@pytest.mark.parametrize("variable", ["PMI_SIZE", "SLURM_NTASKS", "WORLD_SIZE"])
def test_lone_process_of_a_larger_job_is_refused(
    variable: str, run_python: Callable[..., CompletedProcess[str]]
) -> None:
    finished = run_python(["train.py", "--help"], env={variable: "4"})
    assert finished.returncode == 2
    assert f"({variable}=4)" in finished.stderr
    assert f"set {OPT_OUT}=1" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


def test_opt_out(run_python: Callable[..., CompletedProcess[str]]) -> None:
    finished = run_python(["train.py", "--help"], env={"SLURM_NTASKS": "4", OPT_OUT: "1"})
    assert finished.returncode == 0
    assert "usage: train.py" in finished.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2"}, ("SLURM_NTASKS", 2)),
        ({"SLURM_NTASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"}, ("OMPI_COMM_WORLD_SIZE", 8)),
        ({"SLURM_NTASKS": "2", "PMI_SIZE": "4"}, ("PMI_SIZE", 4)),
        ({"SLURM_NTASKS": "8(x2)"}, None),
        ({"SLURM_NTASKS": "2", "WORLD_SIZE": "16"}, ("WORLD_SIZE", 16)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, ("OMPI_COMM_WORLD_SIZE", 2)),
    ],
)
def test_which_promise_counts(environment: dict[str, str], expected: tuple[str, int] | None) -> None:
    assert launch.promised_size(environment) == expected


def test_only_a_broken_promise_is_refused() -> None:
    launch.check_world_size(8, {"SLURM_NTASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"})
    launch.check_world_size(1, {})
    launch.check_world_size(1, {"SLURM_NTASKS": "2", OPT_OUT: "1"})
    for opt_out in ({}, {OPT_OUT: "0"}):
        with pytest.raises(InputError, match=r"promised 2 ranks \(SLURM_NTASKS=2\) but MPI sees 1"):
            launch.check_world_size(1, {"SLURM_NTASKS": "2", **opt_out})

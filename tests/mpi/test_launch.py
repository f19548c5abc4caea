"""What the launcher's environment promises is checked against the ranks that there are."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from kfac_dist.communicator import launch
from kfac_dist.errors import InputError

OPT_OUT = "KFAC_DIST_ALLOW_SIZE_MISMATCH"


@pytest.mark.parametrize("variable", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
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
    finished = run_python(["train.py", "--help"], env={"SLURM_STEP_NUM_TASKS": "4", OPT_OUT: "1"})
    assert finished.returncode == 0
    assert "usage: train.py" in finished.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ("SLURM_STEP_NUM_TASKS", 2)),
        ({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"}, ("OMPI_COMM_WORLD_SIZE", 8)),
        ({"SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4"}, ("PMI_SIZE", 4)),
        ({"SLURM_STEP_NUM_TASKS": "8(x2)"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, ("WORLD_SIZE", 16)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, ("OMPI_COMM_WORLD_SIZE", 2)),
    ],
)
def test_which_promise_counts(environment: dict[str, str], expected: tuple[str, int] | None) -> None:
    assert launch.promised_size(environment) == expected


def test_only_a_broken_promise_is_refused() -> None:
    launch.check_world_size(8, {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"})
    launch.check_world_size(1, {})
    launch.check_world_size(1, {"SLURM_STEP_NUM_TASKS": "2", OPT_OUT: "1"})
    for opt_out in ({}, {OPT_OUT: "0"}):
        with pytest.raises(InputError, match=r"promised 2 ranks \(SLURM_STEP_NUM_TASKS=2\) but MPI sees 1"):
            launch.check_world_size(1, {"SLURM_STEP_NUM_TASKS": "2", **opt_out})


STEP = {"SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize("launcher", [{"OMPI_COMM_WORLD_SIZE": "1"}, STEP | {"SLURM_NTASKS": "1"}, {"PMIX_RANK": "0"}])
def test_an_allocations_tasks_are_no_promise(launcher: dict[str, str]) -> None:
    """In `salloc -n 4` and in a batch script, where plain python is one process."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    assert launch.promised_size(allocation) is None
    assert launch.unused_tasks(allocation) == 4
    assert launch.unused_tasks(allocation | STEP) == 4, "salloc's shell with LaunchParameters=use_interactive_step"
    assert launch.unused_tasks(allocation | launcher) == launch.unused_tasks({"SLURM_NTASKS": "1"}) == 0
    assert launch.unused_tasks(allocation | {OPT_OUT: "1"}) == 0


def test_what_does_not_train_needs_no_launcher(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    quickstart = ["train.py", "configs/quickstart.yaml", f"run.output_dir={tmp_path}"]
    refused = run_python(quickstart, env={"SLURM_NTASKS": "4"})
    assert refused.returncode == 2
    assert "by neither mpirun nor srun, in an allocation of 4 tasks (SLURM_NTASKS=4)" in refused.stderr
    assert not list(tmp_path.iterdir())
    for option, shown in (("--explain", "on digits with kfac, 1 rank"), ("--print-config", "name: quickstart")):
        finished = run_python([*quickstart, option], env={"SLURM_NTASKS": "4"})
        assert finished.returncode == 0, finished.stderr
        assert shown in finished.stdout

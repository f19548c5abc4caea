"""What a script of one's own gets from `create_communicator`: an end when a rank fails, and no need of MPI for one."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from kfac_dist.communicator import create_communicator, library_version
from kfac_dist.communicator.launcher_variables import check_world_size
from kfac_dist.errors import InputError
from tests.mpi.test_failures import seconds_since_failure
from tests.paths import QUICKSTART, ROOT

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

# python -c WITHOUT_MPI SCRIPT ARGUMENTS…
WITHOUT_MPI = (
    "import runpy, sys; sys.modules['mpi4py'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.parametrize("case", ["raise", "group_after", "thread_ignored"])
def test_one_rank_raises(case: str, run_program: Run) -> None:
    """Defect: the job hung, for only the package's own programs aborted."""
    finished = run_program(2, "own_script.py", case, timeout=60)
    assert seconds_since_failure(finished) < 10
    assert finished.returncode == 3
    assert finished.stderr.count("RuntimeError: disk on fire") == 1
    assert finished.stderr.count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize("case", ["no_stdout", "full_stdout", "own_hook"])
def test_one_rank_raises_where_little_can_be_said(case: str, run_program: Run) -> None:
    """Defect: an error while the failure was told kept the rank from ending the others, and the job hung."""
    finished = run_program(2, "own_script.py", case, timeout=60)
    assert seconds_since_failure(finished) < 10
    assert finished.returncode == 3
    assert case == "own_hook" or "RuntimeError: disk on fire" in finished.stderr


def test_the_hook_can_be_left_out(run_program: Run) -> None:
    finished = run_program(2, "own_script.py", "opt_out")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "hook left alone, then set once\n"


def test_one_rank_keeps_its_hook() -> None:
    before = sys.excepthook
    create_communicator()
    assert sys.excepthook is before


def test_the_example_needs_no_mpi(run_python: Run) -> None:
    """Defect: one process could not start without an MPI library."""
    finished = run_python(["-c", WITHOUT_MPI, ROOT / "examples" / "own_script.py"], {"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    assert "accuracy on rank 0's share: " in finished.stdout


def test_the_trainer_needs_no_mpi(run_python: Run, tmp_path: Path) -> None:
    overrides = [f"run.output_dir={tmp_path}", "train.epochs=1"]
    finished = run_python(["-c", WITHOUT_MPI, ROOT / "train.py", QUICKSTART, *overrides], {"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "quickstart" / "DONE").exists()


def test_a_rank_of_several_needs_it(run_python: Run) -> None:
    env = {"PYTHONPATH": str(ROOT), "OMPI_COMM_WORLD_SIZE": "2"}
    finished = run_python(["-c", WITHOUT_MPI, ROOT / "train.py"], env)
    assert finished.returncode == 2
    promised = "error: the launcher promised 2 ranks (OMPI_COMM_WORLD_SIZE=2), but mpi4py cannot be loaded"
    assert promised in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_librarys_name_ends_before_its_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: MPICH's name came with the zero that ends it in C, and made files of the message binary."""
    mpi = SimpleNamespace(Get_library_version=lambda: "MPICH Version: 4.1\x00\nMPICH Release date: …\x00")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(__version__="4.0", MPI=mpi))
    assert library_version() == "MPICH Version: 4.1 (mpi4py 4.0)"
    with pytest.raises(InputError, match=r"MPI sees 1: .*\(MPICH Version: 4\.1 \(mpi4py 4\.0\)\)"):
        check_world_size(1, {"OMPI_COMM_WORLD_SIZE": "2"})

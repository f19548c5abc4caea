"""Ranks that torch.distributed connects, MPI or not: torchrun's, and those of a default group that the script made."""

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

from kfac_dist.communicator.base import ranks_in_words
from kfac_dist.communicator.launcher_variables import launched_by_mpi, launched_by_torchrun
from tests.paths import QUICKSTART, ROOT

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]

PROGRAMS = ROOT / "tests" / "mpi" / "programs"
# Between one rank and two: float64 and other orders of the same sums.
TOLERANCE = 1e-9


@pytest.mark.parametrize(("backend", "num_ranks"), [("torch", 1), ("torch", 2), ("torch", 3), ("torch-staged", 2)])
def test_collectives(backend: str, num_ranks: int, torchrun: Run) -> None:
    finished = torchrun(num_ranks, PROGRAMS / "backend_checks.py", str(num_ranks), backend)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"14 checks passed on {num_ranks} ranks" in finished.stdout
    assert f"{ranks_in_words(num_ranks)} over GLOO, {num_ranks} on this host" in finished.stdout


def weights(folder: Path, size: int, rank: int) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder / f"{size}-{rank}.pt", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def one_rank(run_python: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("weights")
    finished = run_python([PROGRAMS / "own_script_weights.py", folder, "plain"], env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "1 ranks: 1 rank, without MPI\n"
    return weights(folder, 1, 0)


def test_collectives_beside_the_programs(torchrun: Run) -> None:
    """Defect: in one group with the program's, they were mixed up where the ranks began them in different orders."""
    finished = torchrun(2, PROGRAMS / "own_script.py", "orders", timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "theirs [1.0], ours [30.0], given up after 0:01:17\n"


@pytest.mark.parametrize("way", ["plain", "module", "no_sync", "synced", "overlap"])
def test_own_script_equals_one_rank(way: str, one_rank: dict[str, Tensor], torchrun: Run, tmp_path: Path) -> None:
    """Defect: each process trained by itself, also beside a process group of the script's own."""
    finished = torchrun(2, PROGRAMS / "own_script_weights.py", tmp_path, way)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "2 ranks: 2 ranks over GLOO, 2 on this host\n"
    first, second = weights(tmp_path, 2, 0), weights(tmp_path, 2, 1)
    for name, value in one_rank.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_ranks_whose_backward_passes_differ_send_in_one_order(torchrun: Run) -> None:
    """One leaves out a layer that the other has, micro-batches and overflows are one's own; equal to sending after."""
    finished = torchrun(2, PROGRAMS / "overlap.py", timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines() == ["kfac: sent early, equal", "sgd: sent early, equal"]


def test_processes_that_no_launcher_started(run_python: Run) -> None:
    """They have made the default process group themselves, and no variable tells of them."""
    finished = run_python([PROGRAMS / "own_script.py", "spawn"], env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(r"2 ranks without MPI: 2 ranks over (GLOO|NCCL [\d.]+), 2 on this host\n", finished.stdout)


def test_the_trainer(torchrun: Run, tmp_path: Path) -> None:
    """Defect: two processes trained the same run, each as rank 0 of one."""
    finished = torchrun(2, ROOT / "train.py", QUICKSTART, f"run.output_dir={tmp_path}", "train.epochs=1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(re.findall(r"2 ranks over (?:GLOO|NCCL [\d.]+), 2 on this host", finished.stdout + finished.stderr)) == 1
    assert finished.stdout.count("test accuracy") == 1
    assert (tmp_path / "quickstart" / "DONE").exists()


def test_the_doctor(torchrun: Run, tmp_path: Path) -> None:
    finished = torchrun(2, ROOT / "scripts" / "doctor.py", "--output", tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    words = " ".join(finished.stdout.split())  # the columns' widths depend on whether there are GPUs
    assert words.count("launcher torchrun; torch.distributed connects its ranks") == 1
    assert "world size 2, as promised by WORLD_SIZE" in words


def test_mpi_cannot_connect_torchruns_ranks(torchrun: Run, tmp_path: Path) -> None:
    overrides = [f"run.output_dir={tmp_path}", "communication.backend=mpi"]
    finished = torchrun(2, ROOT / "train.py", QUICKSTART, *overrides)
    assert finished.returncode != 0
    assert finished.stderr.count("error: the launcher promised 2 ranks (WORLD_SIZE=2)") == 1
    assert "exitcode  : 2" in finished.stderr
    assert not (tmp_path / "quickstart").exists()


def test_incomplete_variables_are_named(run_python: Run) -> None:
    script = "from kfac_dist import create_communicator; create_communicator(backend='torch')"
    finished = run_python(["-c", script], env={"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "0"})
    assert finished.returncode == 1
    assert "needs a default process group or the variables RANK, WORLD_SIZE" in finished.stderr


def test_a_script_that_fails_on_one_rank_ends(torchrun: Run) -> None:
    finished = torchrun(2, PROGRAMS / "own_script.py", "raise", timeout=60)
    assert finished.returncode != 0
    assert finished.stderr.count("RuntimeError: disk on fire") == 1
    assert "exitcode  : 3" in finished.stderr


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ELASTIC = TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "by_torchrun", "by_mpi"),
    [
        ({}, False, False),
        (TORCHRUN, True, False),
        (ELASTIC, True, False),
        (ELASTIC | {"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"}, True, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, False, False),
        (TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, False, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, True),
        ({"PMI_RANK": "0"}, False, True),
        ({"SLURM_STEP_NUM_TASKS": "2"}, False, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, False),
    ],
)
def test_who_launched(environment: dict[str, str], by_torchrun: bool, by_mpi: bool) -> None:
    assert launched_by_torchrun(environment) == by_torchrun
    assert launched_by_mpi(environment) == by_mpi


def test_an_nccl_group_gets_gloo_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors on the CPU could not be sent; here the group is one of gloo that says it is NCCL's."""
    from kfac_dist.communicator import connect

    monkeypatch.setattr(connect, "_opened", [])
    monkeypatch.setattr(connect.atexit, "register", lambda function: None)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
        assert connect.has_default_group()
        communicator = connect.connect_by_default_group()
        assert communicator._group is not torch.distributed.group.WORLD
        assert communicator.all_reduce_(torch.ones(2)).tolist() == [1, 1]
    finally:
        torch.distributed.destroy_process_group()

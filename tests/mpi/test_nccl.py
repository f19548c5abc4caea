"""ProcessGroupCommunicator, over gloo where there is no GPU, and how MPI takes a device's buffers."""

import logging
import os
import socket
import time
from collections.abc import Callable
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

from kfac_dist.communicator import MpiCommunicator, connect, create, create_communicator
from kfac_dist.communicator.devices import RankDevice
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.errors import InputError
from kfac_dist.vocabulary import BackendChoice

pytestmark = pytest.mark.mpi

Run = Callable[..., CompletedProcess[str]]


def check_backend(run_program: Run, num_ranks: int, backend: str) -> str:
    finished = run_program(num_ranks, "backend_checks.py", str(num_ranks), backend)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"14 checks passed on {num_ranks} ranks" in finished.stdout
    # Neither warnings nor complaints at exit; but of a machine with fewer GPUs than ranks they are told.
    assert [line for line in finished.stderr.splitlines() if " share GPU " not in line] == []
    return finished.stdout


@pytest.mark.parametrize(
    ("backend", "num_ranks"),
    [
        *(("gloo", num_ranks) for num_ranks in (1, 2, 3, 4)),
        *(("lists", num_ranks) for num_ranks in (2, 3)),
        *(("pieces", num_ranks) for num_ranks in (1, 2, 3)),
        ("staged", 1),
        ("staged", 3),
        ("dlpack", 2),
    ],
)
def test_collectives(backend: str, num_ranks: int, run_program: Run) -> None:
    check_backend(run_program, num_ranks, backend)


@pytest.mark.gpu
def test_nccl_on_one_rank(run_program: Run) -> None:
    assert "1 rank over NCCL" in check_backend(run_program, 1, "nccl")


@pytest.mark.gpu
def test_nccl_on_a_gpu_each(run_program: Run) -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        pytest.skip("needs two CUDA devices")
    check_backend(run_program, min(4, num_gpus), "nccl")


@pytest.mark.gpu
@pytest.mark.skipif("KFAC_DIST_EMULATED_GPUS" not in os.environ, reason="only an emulated NCCL tells its calls")
def test_uneven_segments_are_one_operation_of_nccl(run_program: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 3:
        pytest.skip("needs three CUDA devices")
    monkeypatch.setenv("KFAC_DIST_EMULATED_NCCL", "trace")
    finished = run_program(3, "uneven_segments.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for operation in ("Reduce", "Broadcast"):
        calls = [line for line in finished.stderr.splitlines() if f" {operation} " in line]
        assert len(calls) == 9, "of each rank, one to or from each owner"
        assert all(call.endswith(" grouped") for call in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_mpi_on_a_gpu(num_ranks: int, run_program: Run) -> None:
    """Two ranks share the GPU where there is one only."""
    printed = check_backend(run_program, num_ranks, "mpi-gpu")
    assert "CUDA-aware" in printed or "CUDA buffers through pinned host memory" in printed


@pytest.mark.parametrize("case", ["two", "users_group", "other_order"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_beside_other_groups(case: str, num_ranks: int, run_program: Run) -> None:
    if case == "other_order" and num_ranks == 1:
        pytest.skip("one rank has one order")
    finished = run_program(num_ranks, "group_cases.py", str(num_ranks), case)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "passed\n"
    assert finished.stderr == ""


def test_a_rank_that_cannot_connect_ends_the_job(run_program: Run) -> None:
    start = time.monotonic()
    finished = run_program(2, "group_cases.py", "2", "unreachable")
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert "error: gloo could not connect the 2 ranks" in finished.stderr
    assert "NCCL_SOCKET_IFNAME" in finished.stderr
    assert time.monotonic() - start < 60


def test_an_uncaught_exception_is_told_and_ends_the_job(run_program: Run) -> None:
    """Defect: torch's own hook, which init_process_group puts before ours, swallows the traceback."""
    finished = run_program(2, "group_cases.py", "2", "uncaught")
    assert finished.returncode == 3, finished.stdout + finished.stderr
    assert finished.stderr.count("RuntimeError: disk on fire") == 1


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_nccl_without_gpus(num_ranks: int, run_program: Run) -> None:
    finished = run_program(num_ranks, "group_cases.py", str(num_ranks), "nccl_on_cpus")
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert finished.stderr.count("error: ") == 1
    assert "communication.backend=nccl needs a GPU of its own for every rank" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_slow_start_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with connect._explaining("nccl", 2, seconds=30):
            pass
        assert not caplog.records
        with connect._explaining("nccl", 2, seconds=0.01):
            time.sleep(0.5)
    assert "nccl has not connected the ranks" in caplog.text
    assert "NCCL_SOCKET_IFNAME" in caplog.text


@pytest.mark.parametrize(
    ("local_size", "resolved", "expected"),
    [(4, "10.0.0.7", "127.0.0.1"), (2, "10.0.0.7", "10.0.0.7"), (2, "127.0.1.1", None), (2, None, None)],
)
def test_address(local_size: int, resolved: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(name: str) -> str:
        if resolved is None:
            raise OSError("no such host")
        return resolved

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    found = connect._address(SimpleNamespace(size=4, local_size=local_size))  # type: ignore[arg-type]
    assert found == expected or (expected is None and not found.startswith("127."))


@pytest.mark.parametrize(
    ("wanted", "device", "has_nccl", "taken"),
    [
        ("auto", "cuda", True, LocalCommunicator),
        ("auto", "cpu", True, LocalCommunicator),
        ("mpi", "cuda", True, MpiCommunicator),
        ("nccl", "cuda", True, tuple),
        ("nccl", "cuda", False, "needs a torch with NCCL"),
        ("nccl", "cpu", True, "needs a GPU of its own"),
    ],
)
def test_choice_of_backend_on_one_rank(
    wanted: BackendChoice, device: str, has_nccl: bool, taken: type | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = RankDevice("alpha", device, "GPU-1" if device == "cuda" else "", "A100", 1)
    monkeypatch.setattr(create, "describe_device", lambda device: said)
    monkeypatch.setattr(create, "running_mpi", lambda: None)  # other tests of this process may have started it
    monkeypatch.setattr(create.dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(connect, "connect_gpus", lambda host, device: (host, device))
    where = torch.device(device, 0)
    if isinstance(taken, str):
        with pytest.raises(InputError, match=taken):
            create_communicator("reduce", wanted, where)
        return
    made = create_communicator("reduce", wanted, where)
    assert isinstance(made, taken)
    assert taken is not tuple or made[1] == where  # type: ignore[index]


@pytest.mark.parametrize("wanted", ["auto", "torch", "mpi", "nccl"])
@pytest.mark.parametrize(("gpus", "has_own"), [("a b", True), ("a a", False), ("a -", False)])
@pytest.mark.parametrize("has_nccl", [True, False])
def test_nccl_is_taken_for_a_gpu_each(wanted: create.Backend, gpus: str, has_own: bool, has_nccl: bool) -> None:
    devices = [
        RankDevice("alpha", "cpu") if gpu == "-" else RankDevice("alpha", "cuda", gpu, "A100", 2)
        for gpu in gpus.split()
    ]
    expected = wanted == "nccl" or (wanted in ("auto", "torch") and has_own and has_nccl)
    assert create._takes_nccl(wanted, devices, has_nccl) == expected

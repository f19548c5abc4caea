"""The doctor's rules on GPUs, given made-up facts."""

from collections.abc import Mapping
from typing import Any

import pytest

from kfac_dist.doctor import gpus
from kfac_dist.doctor.findings import Status
from kfac_dist.doctor.gpus import Gpu
from kfac_dist.doctor.ranks import RankFacts

GIB = 1 << 30
BUILT_FOR = ("sm_75", "sm_80", "sm_90a", "compute_100")
INTERFACES = ("eth0", "ib0", "lo")


@pytest.mark.parametrize(
    ("num_gpus", "driver", "torch_cuda", "visible", "status", "words"),
    [
        (8, True, "13.0", None, "ok", "8 visible"),
        (1, True, "13.0", "3", "ok", "CUDA_VISIBLE_DEVICES=3"),
        (0, False, "13.0", None, "ok", "no NVIDIA driver"),
        (0, False, None, None, "ok", "no NVIDIA driver"),
        (0, True, "13.0", "", "note", "hides every GPU"),
        (0, True, "13.0", "-1", "note", "hides every GPU"),
        (0, True, None, None, "warning", "is a build for the CPU"),
        (0, True, "13.0", None, "warning", "torch sees no GPU: driver too old"),
        (0, True, "13.0", "9", "warning", "torch sees no GPU"),
    ],
)
def test_driver(
    num_gpus: int, driver: bool, torch_cuda: str | None, visible: str | None, status: Status, words: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    finding = gpus.check_driver(num_gpus, driver, torch_cuda, environment, "driver too old")
    assert finding.status == status
    assert words in finding.found


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [((6, 1), ["fp32"]), ((7, 0), ["fp32", "fp16"]), ((7, 5), ["fp32", "fp16"]), ((8, 0), ["fp32", "fp16", "bf16"])],
)
def test_precisions(capability: tuple[int, int], precisions: list[str]) -> None:
    assert gpus.precisions_of(capability) == precisions


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 6), True),  # binaries of the same major capability
        ((9, 0), True),
        ((9, 1), False),  # the letter ties sm_90a to 9.0
        ((10, 0), True),
        ((12, 0), True),  # intermediate code is compiled for what is newer
    ],
)
def test_kernels(capability: tuple[int, int], runs: bool) -> None:
    assert gpus.has_kernels(capability, BUILT_FOR) is runs


def gpu(capability: tuple[int, int] = (9, 0), used: int = 0, sharing: int = 1) -> Gpu:
    return Gpu(0, "NVIDIA H200", capability, 139 * GIB, 139 * GIB - used, sharing)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (gpu(), ["ok", "ok"]),
        (gpu((7, 5)), ["note", "ok"]),
        (gpu((7, 0)), ["error"]),
        (gpu(used=GIB // 2), ["ok", "ok"]),  # CUDA's own
        (gpu(used=30 * GIB), ["ok", "note"]),
        (gpu(used=3 * GIB, sharing=4), ["ok", "ok"]),
    ],
)
def test_gpu(given: Gpu, expected: list[Status]) -> None:
    found = gpus.check_gpu(given, BUILT_FOR)
    assert [finding.status for finding in found] == expected
    assert found[0].found.startswith(f"NVIDIA H200, 139.0 GiB, compute capability {given.capability[0]}.")


def test_what_a_gpu_lacks_is_said() -> None:
    old = gpus.check_gpu(gpu((7, 5)), BUILT_FOR)[0]
    assert "no bf16" in old.found
    assert old.remedy == "train.precision=fp16 or fp32"
    assert (
        "has no kernels for it (sm_75, sm_80, sm_90a, compute_100)" in gpus.check_gpu(gpu((7, 0)), BUILT_FOR)[0].found
    )
    assert gpus.check_gpu(gpu((6, 0)), ())[0].remedy == "train.precision=fp32"
    assert "30.0 of 139.0 GiB are in use by others" in gpus.check_gpu(gpu(used=30 * GIB), ())[1].found


@pytest.mark.parametrize(
    ("version", "num_gpus", "environment", "docker", "status"),
    [
        (None, 0, {}, True, "ok"),
        (None, 1, {}, False, "warning"),
        ("2.30.7", 1, {}, False, "ok"),
        ("2.30.7", 1, {}, True, "note"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "eth"}, True, "ok"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "enp,ib"}, True, "ok"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "^docker0"}, True, "ok"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "enp3s0"}, False, "error"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "=eth"}, False, "error"),
        ("2.30.7", 1, {"NCCL_SOCKET_IFNAME": "=eth0"}, False, "ok"),
    ],
)
def test_nccl(version: str | None, num_gpus: int, environment: Mapping[str, str], docker: bool, status: Status) -> None:
    finding = gpus.check_nccl(version, num_gpus, environment, INTERFACES, docker)
    assert finding.status == status
    assert status != "note" or "NCCL_SOCKET_IFNAME" in finding.remedy


def task(*uuids: str, num_gpus: int = 1, **shared: Any) -> list[RankFacts]:
    return [RankFacts("a", gpu=uuid, num_gpus=num_gpus if uuid else 0, **shared) for uuid in uuids]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (task("", ""), []),
        (task("GPU-1", "GPU-2"), [("ok", ())]),
        (task("GPU-1", "", "GPU-2", ""), [("error", (1, 3))]),
        (task("GPU-1", "GPU-2", "GPU-1"), [("warning", (0, 2))]),
        (task("GPU-1", "GPU-2", num_gpus=4), [("note", (0, 1))]),
        (task("GPU-1", "GPU-1", num_gpus=4), [("warning", (0, 1)), ("note", (0, 1))]),
    ],
)
def test_one_gpu_a_rank(facts: list[RankFacts], expected: list[tuple[Status, tuple[int, ...]]]) -> None:
    assert [(finding.status, finding.ranks) for finding in gpus.check_gpus_of_all(facts)] == expected


def test_what_is_wrong_between_ranks_is_said() -> None:
    (missing,) = gpus.check_gpus_of_all(task("GPU-1", ""))
    assert missing.found == "no GPU, while 1 of 2 ranks have one"
    (shared,) = gpus.check_gpus_of_all(task("GPU-1", "GPU-1"))
    assert shared.found == "2 ranks share GPU GPU-1: they take turns, and NCCL refuses"
    assert "only communication.backend=mpi allows sharing" in shared.remedy
    (idle,) = gpus.check_gpus_of_all(task("GPU-1", num_gpus=8))
    assert (idle.found, idle.remedy) == ("1 of 8 GPUs of a used", "mpirun --map-by ppr:8:node")


def test_cuda_awareness() -> None:
    facts = task("GPU-1", "GPU-2")
    assert gpus.check_cuda_aware(task("", ""))[0].found == "not needed without GPUs"
    assert gpus.check_cuda_aware(facts)[0].status == "note"
    facts[0].cuda_aware = True
    (finding,) = gpus.check_cuda_aware(facts)
    assert (finding.status, finding.ranks) == ("warning", (1,))
    facts[1].cuda_aware = True
    assert gpus.check_cuda_aware(facts)[0].status == "ok"


@pytest.mark.gpu
def test_a_real_gpu_is_read() -> None:
    count, _ = gpus.count_gpus()
    own = gpus.read_gpu(count, local_rank=0, local_size=1)
    assert 0 < own.free_bytes <= own.total_bytes
    assert own.sharing == 1
    assert gpus.read_uuid(own)
    assert gpus.driver_is_there()
    assert gpus.nccl_version()

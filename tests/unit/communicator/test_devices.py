"""The rules that the devices of all ranks must keep, as tables."""

import re

import pytest
import torch

from kfac_dist import local_device
from kfac_dist.communicator import devices
from kfac_dist.communicator.devices import (
    RankDevice,
    check_capability,
    check_devices,
    check_precision,
    choose_device,
    current_device,
    describe_device,
    device_uuid,
    each_has_own_gpu,
    find_shared,
)
from kfac_dist.errors import InputError


def gpu(uuid: str, host: str = "alpha", model: str = "A100", num_visible: int = 2) -> RankDevice:
    return RankDevice(host, "cuda", uuid, model, num_visible)


def cpu(host: str = "alpha") -> RankDevice:
    return RankDevice(host, "cpu")


@pytest.mark.parametrize(
    ("uuids", "shared"),
    [
        ([], {}),
        (["a"], {}),
        (["a", "b", "c"], {}),
        (["", "", ""], {}),
        (["a", "b", "a", ""], {"a": [0, 2]}),
        (["b", "a", "a", "b", "a"], {"b": [0, 3], "a": [1, 2, 4]}),
    ],
)
def test_shared_gpus(uuids: list[str], shared: dict[str, list[int]]) -> None:
    assert find_shared(uuids) == shared


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([gpu("a")], True),
        ([gpu("a"), gpu("b")], True),
        ([gpu("a"), gpu("a")], False),
        ([gpu("a"), cpu()], False),
        ([cpu()], False),
    ],
)
def test_each_has_own_gpu(ranks: list[RankDevice], expected: bool) -> None:
    assert each_has_own_gpu(ranks) is expected


@pytest.mark.parametrize("backend", ["mpi", "nccl"])
@pytest.mark.parametrize("ranks", [[gpu("a")], [gpu("a"), gpu("b"), gpu("c", "beta"), gpu("d", "beta")]])
def test_a_gpu_each_is_fine(ranks: list[RankDevice], backend: str) -> None:
    assert check_devices(ranks, backend) == []  # type: ignore[arg-type]


def test_cpus_are_fine_over_mpi_only() -> None:
    assert check_devices([cpu(), cpu("beta")], "mpi") == []
    with pytest.raises(InputError, match=r"no rank has one \(on alpha, beta\); use communication.backend=mpi, or auto"):
        check_devices([cpu(), cpu("beta")], "nccl")


def test_nccl_refuses_a_shared_gpu_by_its_uuid() -> None:
    ranks = [gpu("GPU-1"), gpu("GPU-2"), gpu("GPU-1"), gpu("GPU-3", "beta")]
    with pytest.raises(InputError) as caught:
        check_devices(ranks, "nccl")
    text = str(caught.value)
    assert "ranks 0, 2 share GPU GPU-1 of alpha" in text
    for remedy in ("fewer ranks", "--gpus-per-node", "communication.backend=mpi"):
        assert remedy in text
    assert "GPU-2" not in text


def test_mpi_shares_a_gpu_and_says_so() -> None:
    assert check_devices([gpu("GPU-1", num_visible=1)] * 2, "mpi") == ["ranks 0, 1 share GPU GPU-1 of alpha"]
    (line,) = check_devices([gpu("GPU-1"), gpu("GPU-1")], "mpi")
    assert line.endswith("although that host has 2")


@pytest.mark.parametrize("backend", ["mpi", "nccl"])
def test_cpu_and_gpu_do_not_mix(backend: str) -> None:
    ranks = [gpu("a"), gpu("b"), cpu("beta"), cpu("gamma")]
    with pytest.raises(InputError, match=r"ranks 0, 1 use cuda \(on alpha\); ranks 2, 3 have no GPU \(on beta, gamma"):
        check_devices(ranks, backend)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"rank 0 has no GPU .*; rank 1 uses cuda"):
        check_devices([cpu(), gpu("a")], backend)  # type: ignore[arg-type]


def test_a_thousand_ranks_are_not_all_named() -> None:
    with pytest.raises(InputError, match=re.escape("ranks 0, 1, 2, 3, 4, 5, 6, 7, … (999 in all) use cuda")):
        check_devices([gpu(str(rank), f"host{rank}") for rank in range(999)] + [cpu("last")], "mpi")


def test_models_and_counts_that_differ_are_reported() -> None:
    (line,) = check_devices([gpu("a"), gpu("b", model="V100")], "nccl")
    assert line == "GPUs of different models, all ranks wait for the slowest: rank 0 on A100; rank 1 on V100"
    (line,) = check_devices([gpu("a"), gpu("b", num_visible=1)], "nccl")
    assert line.startswith("ranks of host alpha see different numbers of GPUs (rank 0: 2; rank 1: 1)")
    assert check_devices([gpu("a"), gpu("b", "beta", num_visible=1)], "nccl") == []


@pytest.mark.parametrize(
    ("precision", "capability", "remedy"),
    [
        ("fp32", (3, 5), None),
        ("fp64", (3, 5), None),
        ("fp16", (7, 0), None),
        ("fp16", (6, 1), "fp32"),
        ("bf16", (8, 0), None),
        ("bf16", (9, 0), None),
        ("bf16", (7, 5), "fp32 or fp16"),
        ("bf16", (6, 0), "fp32"),
    ],
)
def test_precision_needs_tensor_cores(precision: str, capability: tuple[int, int], remedy: str | None) -> None:
    if remedy is None:
        check_capability(precision, capability, "GPU")
        return
    with pytest.raises(InputError) as caught:
        check_capability(precision, capability, "Tesla T4")
    assert f"Tesla T4 has {capability[0]}.{capability[1]}" in str(caught.value)
    assert str(caught.value).endswith(f"use train.precision={remedy}")


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "fp16"])
def test_the_cpu_takes_every_precision(precision: str) -> None:
    check_precision(precision, torch.device("cpu"))


def test_what_is_said_arrives() -> None:
    for device in (gpu("GPU-1", host="Größe"), cpu(), describe_device(torch.device("cpu"))):
        assert RankDevice.from_bytes(device.to_bytes()) == device


def test_the_cpu() -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")
    assert device_uuid(torch.device("cpu")) == ""
    assert describe_device(torch.device("cpu")).type == "cpu"


def test_local_ranks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.torch.cuda, "set_device", current.append)
    chosen = [choose_device(wanted, rank).index for wanted in ("auto", "cuda") for rank in range(3)]
    assert chosen == [0, 1, 0] * 2
    assert [device.index for device in current] == chosen
    assert choose_device("cpu", 0) == torch.device("cpu")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == current_device() == torch.device("cpu")
    with pytest.raises(InputError, match=r"run.device must be cpu or auto .* got cuda \(host "):
        choose_device("cuda", 0)


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    device = choose_device("cuda", 0)
    described = describe_device(device)
    assert current_device() == device == torch.device("cuda", 0)
    assert described.uuid == device_uuid(device) != ""
    assert described.model
    assert described.num_visible >= 1
    assert check_devices([described], "nccl") == []


def test_the_device_of_a_rank_of_ones_own_script() -> None:
    device = local_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")

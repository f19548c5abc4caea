"""Copies to the host, on their way: on a CPU at once, on a GPU behind the work of that GPU's own stream."""

from typing import Any

import pytest
import torch

from kfac_dist.tensors import host_copy
from kfac_dist.tensors.host_copy import HostCopy, HostSnapshot, to_device


def test_on_a_cpu_the_values_are_those_of_the_call() -> None:
    tensor = torch.arange(3.0)
    copy = HostCopy(tensor)
    tensor.zero_()
    assert copy.read().tolist() == [0, 1, 2]
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_a_snapshot_is_a_copy_in_memory_that_is_used_again() -> None:
    snapshot = HostSnapshot()
    weight = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    first = snapshot.take({"weight": weight, "step": torch.tensor(1), "gone": torch.ones(3)})
    assert torch.equal(first["weight"], weight)
    assert not first["weight"].requires_grad
    assert first["weight"].stride() == weight.stride()
    assert first["weight"].data_ptr() != weight.data_ptr()
    second = snapshot.take({"weight": weight + 1, "step": torch.tensor(2), "new": torch.zeros(2)})
    assert second["weight"].data_ptr() == first["weight"].data_ptr()
    assert torch.equal(second["weight"], weight + 1)
    assert second["step"].item() == 2
    assert set(second) == {"weight", "step", "new"}


@pytest.mark.parametrize("other", [torch.ones(5), torch.ones(4, dtype=torch.float64), torch.ones(2, 2)])
def test_a_snapshot_takes_new_memory_for_other_tensors(other: torch.Tensor) -> None:
    snapshot = HostSnapshot()
    snapshot.take({"value": torch.zeros(4)})
    taken = snapshot.take({"value": other})["value"]
    assert taken.dtype == other.dtype
    assert torch.equal(taken, other)


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu() -> None:
    snapshot = HostSnapshot()
    tensor = torch.zeros(1 << 20, device="cuda")
    for number in range(3):
        torch.cuda._sleep(10_000_000)
        tensor.add_(1)
        taken = snapshot.take({"value": tensor})["value"]
        assert taken.is_pinned()
        assert bool((taken == number + 1).all())


class TensorOfSecondGpu:
    """As far as HostCopy looks at one, where there is no GPU."""

    device = torch.device("cuda", 1)
    shape = (2,)
    dtype = torch.float32

    def detach(self) -> torch.Tensor:
        return torch.ones(2)


def test_the_event_stands_in_the_stream_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: it stood in that of torch's current device, behind which nothing had been queued."""
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any = "of the current device") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("waited")

    empty = torch.empty
    monkeypatch.setattr(host_copy.torch, "empty", lambda *size, pin_memory, **settings: empty(*size, **settings))
    monkeypatch.setattr(host_copy.torch.cuda, "Event", Event)
    monkeypatch.setattr(host_copy.torch.cuda, "current_stream", lambda device=None: f"of {device}")
    copy = HostCopy(TensorOfSecondGpu())  # type: ignore[arg-type]
    assert copy.read().tolist() == [1, 1]
    assert recorded == ["of cuda:1", "waited"]


@pytest.mark.gpu
def test_on_another_gpu_than_the_current_one() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    tensor = torch.zeros(1 << 20, device=device)
    with torch.cuda.device(0):
        for number in range(20):
            torch.cuda._sleep(1_000_000)
            with torch.cuda.device(device):
                torch.cuda._sleep(10_000_000)
            tensor.add_(1)
            assert bool((HostCopy(tensor).read() == number + 1).all())

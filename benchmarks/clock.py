"""Seconds and memory of calls on a device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the host's clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Seconds of all the calls together; the host may run ahead of the device from one to the next."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    synchronise(device)
    return time.perf_counter() - start


def allocated_bytes(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function for the most bytes allocated on a GPU so far, beyond those before the block; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = allocated_bytes(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before

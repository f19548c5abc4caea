"""Which of several ways to do the same collective is the fastest here, by a measurement of bounded length."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.communicator.base import Communicator

_BUFFER_BYTES = (64 << 10, 1 << 20, 8 << 20, 8 << 20, 8 << 20)
"""The first also sets up connections."""
_SECONDS = 1.0
_TOO_SLOW = 4.0
"""Times the fastest."""

Algorithm = Callable[[Tensor, Sequence[int]], Tensor]
"""Takes a buffer and the numbers of values in each rank's segment, as a V-collective does."""


def measure_algorithms(communicator: Communicator, algorithms: Mapping[str, Algorithm]) -> dict[str, float]:
    """Seconds of each algorithm that is not several times slower than the fastest, on the largest buffer; collective.

    No call starts later than a second after the first, however busy the machine; the one under way is waited for.
    Buffers grow, and what is too slow on a small one is not tried on a larger one. Rank 0's clock and figures decide
    for all, so that every rank makes the same calls.

    Args:
        communicator: Over which the ranks agree.
        algorithms: By name; on CPU buffers.

    Returns:
        By name, the same on every rank; not all algorithms, and none if there was no time for one call of each.
    """
    begin = time.perf_counter()
    names = list(algorithms)
    figures: dict[str, float] = {}
    last_bytes = 0
    for num_bytes in _BUFFER_BYTES:
        seconds = {}
        for name in names:
            if not _rank_0_says(communicator, time.perf_counter() - begin < _SECONDS):
                return _figures_of_rank_0(communicator, figures)
            seconds[name] = _seconds_of(communicator, algorithms[name], num_bytes)
        fastest = min(seconds.values())
        names = [name for name in names if _rank_0_says(communicator, seconds[name] <= _TOO_SLOW * fastest)]
        before = figures if num_bytes == last_bytes else {}
        figures = {name: min(seconds[name], before.get(name, seconds[name])) for name in names}
        last_bytes = num_bytes
    return _figures_of_rank_0(communicator, figures)


def _seconds_of(communicator: Communicator, algorithm: Algorithm, num_bytes: int) -> float:
    counts = [num_bytes // 4 // communicator.size] * communicator.size
    buffer = torch.zeros(sum(counts), device="cpu")
    communicator.barrier()
    start = time.perf_counter()
    algorithm(buffer, counts)
    communicator.barrier()
    return time.perf_counter() - start


def _rank_0_says(communicator: Communicator, decision: bool) -> bool:
    return bool(communicator.broadcast_(torch.tensor(decision, device="cpu")))


def _figures_of_rank_0(communicator: Communicator, figures: Mapping[str, float]) -> dict[str, float]:
    seconds = torch.tensor(list(figures.values()), dtype=torch.float64, device="cpu")
    return dict(zip(figures, communicator.broadcast_(seconds).tolist(), strict=True))

"""What a step does: operations of each stage, bytes that travel, and the rates that the device reaches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from clock import seconds_of
from torch.utils.flop_counter import FlopCounterMode

from kfac_dist.optim.buffers import all_factor_keys
from kfac_dist.optim.kfac import KFAC
from kfac_dist.timing import CudaClock, HostClock

_CALLS = 5
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
_MATRIX_SIZE = {"cpu": 2048, "cuda": 4096}
_COPIED_VALUES = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one large operation each, the best of several calls.

    Attributes:
        product: Of a square product in fp32, operations per second.
        half_product: The same in the workload's half precision; None where it has none.
        cholesky: Of a Cholesky factorisation in fp32.
        memory: Of a copy, bytes per second, read and written.
    """

    product: float
    half_product: float | None
    cholesky: float
    memory: float


def measure_ceilings(device: torch.device, half: torch.dtype | None) -> Ceilings:
    """Measure; a second or so."""
    size, order = _PRODUCT_SIZE[device.type], _MATRIX_SIZE[device.type]
    square = torch.randn(size, size, device=device)
    root = torch.randn(order, order, device=device)
    positive = root @ root.T + order * torch.eye(order, device=device)
    source = torch.zeros(_COPIED_VALUES[device.type], device=device)
    target = torch.empty_like(source)

    def fastest(function: Any) -> float:
        function()
        return min(seconds_of(function, 1, device) for _ in range(_CALLS))

    halved = square if half is None else square.to(half)
    return Ceilings(
        product=2 * size**3 / fastest(lambda: square @ square),
        half_product=None if half is None else 2 * size**3 / fastest(lambda: halved @ halved),
        cholesky=order**3 / 3 / fastest(lambda: torch.linalg.cholesky_ex(positive)),
        memory=2 * source.nbytes / fastest(lambda: target.copy_(source)),
    )


class WorkClock:
    """The clock of a stage timer, which counts operations in place of seconds while it is told to."""

    def __init__(self, device: torch.device) -> None:
        """Read the clock of this device."""
        self._clock = CudaClock(device) if device.type == "cuda" else HostClock()
        self._counter: FlopCounterMode | None = None

    def mark(self) -> Any:
        """This moment, or the operations so far."""
        return self._clock.mark() if self._counter is None else self._counter.get_total_flops()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks, or operations."""
        return float(end - start) if isinstance(start, int) else self._clock.seconds(start, end)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within the block; the timer's lap is to begin and to end in it."""
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as self._counter:
            try:
                yield
            finally:
                self._counter = None


def _cholesky(matrix: Any, *arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
    *count, size, _ = matrix
    return int(torch.Size(count).numel() * size**3 // 3)


def _cholesky_solve(right: Any, factor: Any, *arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
    *count, size, columns = right
    return int(torch.Size(count).numel() * 2 * size**2 * columns)


def _solve_triangular(factor: Any, right: Any, *arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
    return int(torch.Size(right).numel() * factor[-1])


def _cholesky_inverse(factor: Any, *arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
    *count, size, _ = factor
    return int(torch.Size(count).numel() * 2 * size**3 // 3)


def _batched_product(first: Any, second: Any, *arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
    return int(torch.Size(first).numel() * 2 * second[-1])


# Torch counts products and convolutions by itself; older ones fail at a bmm with out_dtype (pytorch/pytorch#189736).
_FORMULAS = {
    torch.ops.aten.bmm: _batched_product,
    torch.ops.aten.linalg_cholesky_ex: _cholesky,
    torch.ops.aten.cholesky_solve: _cholesky_solve,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten.cholesky_inverse: _cholesky_inverse,
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank gives to the collectives of a step with a refresh, and what the formulas say.

    Attributes:
        factors: ReduceScatterV of the factors: 4 Σ n(n+1)/2 over all matrices.
        gradients: ReduceScatterV of the gradients: 4 Σ of the weights.
        updates: AllGatherV of what was preconditioned: the same.
    """

    factors: tuple[int, int]
    gradients: tuple[int, int]
    updates: tuple[int, int]


def traffic_of(optimizer: KFAC) -> Traffic:
    """Bytes of the optimizer's buffers beside the formulas; more where a layer has several owners."""
    shared = optimizer._shared
    blocks = optimizer.blocks
    matrices = [shape for block in blocks for shape in block.factor_shapes.values()]
    weights = sum(block.num_values for block in blocks)

    def in_bytes(values: int) -> int:
        return values * shared.updates.data.element_size()

    return Traffic(
        factors=(
            in_bytes(shared.buffers.factors(all_factor_keys(blocks)).data.numel()),
            in_bytes(sum(count * size * (size + 1) // 2 for count, size in matrices)),
        ),
        gradients=(
            in_bytes(sum(message.buffer.data.numel() for message in shared.buffers.messages)),
            in_bytes(weights),
        ),
        updates=(in_bytes(shared.updates.data.numel()), in_bytes(weights)),
    )

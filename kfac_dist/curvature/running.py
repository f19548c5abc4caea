"""What the owner of a layer keeps: the running Fisher and what it is solved with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks.base import Block, Matrices
from kfac_dist.curvature.solvers import Solver


@dataclass
class RunningAverage:
    """Running average of the factors that one matrix of a block was given, unbiased from the first on.

    With a decay the t-th factor has the weight (1 − decay)/(1 − decay^t), so that the first is the average and no
    start value biases it; without a decay each factor replaces the last.

    With a decay a factor that is not finite would stay for ever. It counts as one more of what the average is already,
    or before any finite one as one more of the first finite one; that is decided on the device.

    Attributes:
        value: The average, (count, n, n), undamped; without values before the first factor.
        num_averaged: Factors that it was given.
    """

    value: Tensor = field(default_factory=lambda: torch.empty(0))
    num_averaged: int = 0

    def next_weight(self, decay: float | None) -> float:
        """Weight of the next factor."""
        count = self.num_averaged + 1
        return 1.0 if decay is None or count == 1 else (1 - decay) / (1 - decay**count)

    def change(self, factor: Tensor, decay: float | None) -> Tensor:
        """Diff (Eq. 19) that `update` would make; infinite for the first factor."""
        if not self.num_averaged:
            return factor.new_tensor(float("inf"))
        return relative_change(factor, self.value) * self.next_weight(decay)

    def update(self, factor: Tensor, decay: float | None) -> None:
        """`update_running_averages` of this one."""
        update_running_averages([(self, factor)], decay)


class BlockCurvature:
    """Running matrices and solvers of one block.

    Attributes:
        block: The block.
        averages: Running average of each matrix.
        solvers: The damped matrices as they are solved with; empty before the first refresh.
    """

    def __init__(self, block: Block) -> None:
        """Start with no factors."""
        self.block = block
        self.averages = {matrix: RunningAverage() for matrix in block.factor_shapes}
        self.solvers: dict[str, Solver] = {}

    @property
    def running(self) -> Matrices:
        """The running averages themselves, (count, n, n), of those matrices that have been given factors."""
        return {matrix: average.value for matrix, average in self.averages.items() if average.num_averaged}

    def leave_shared_memory(self) -> None:
        """Copy solvers that lie behind those of others in memory, which cannot be freed while one of them is there."""
        for matrix, solver in self.solvers.items():
            if solver.matrix.untyped_storage().nbytes() > solver.matrix.nbytes:
                self.solvers[matrix] = Solver(solver.matrix.clone(), solver.is_inverse)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values; nothing is copied."""
        return {
            "running": self.running,
            "solvers": {matrix: solver.matrix for matrix, solver in self.solvers.items()},
            "inverted": [matrix for matrix, solver in self.solvers.items() if solver.is_inverse],
            "num_averaged": {matrix: self.averages[matrix].num_averaged for matrix in self.running},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Replace everything by copies of what `state_dict` returned."""
        self.averages = {matrix: RunningAverage() for matrix in self.block.factor_shapes}
        for matrix, value in state["running"].items():
            self.averages[matrix] = RunningAverage(value.to(device, dtype, copy=True), state["num_averaged"][matrix])
        self.solvers = {
            matrix: Solver.restored(value.to(device, dtype, copy=True), matrix in state["inverted"])
            for matrix, value in state["solvers"].items()
        }


def update_running_averages(factors: Sequence[tuple[RunningAverage, Tensor]], decay: float | None) -> None:
    """Take new factors into their running averages, in few launches.

    Args:
        factors: Running average and new factor, (count, n, n), each; the factors are kept or overwritten.
        decay: Share of the old average, in (0, 1), or None.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for average, factor in factors:
        weight = average.next_weight(decay)
        average.num_averaged += 1
        if weight == 1:
            average.value = factor
            continue
        old, new = by_weight.setdefault(weight, ([], []))
        old.append(average.value)
        new.append(factor)
    for weight, (old, new) in by_weight.items():
        if old[0].device.type == "cpu":  # which may be asked: there is nothing to wait for
            old, new = _keep_finite_on_host(old, new)
        else:
            _keep_finite_on_device(old, new)
        if old:
            torch._foreach_lerp_(old, new, weight)


def _keep_finite_on_host(old: list[Tensor], new: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those pairs of which both are finite; of the others the old value becomes the finite one of the two."""
    kept: tuple[list[Tensor], list[Tensor]] = [], []
    for average, factor in zip(old, new, strict=True):
        if not _is_finite(factor):
            continue
        if _is_finite(average):
            kept[0].append(average)
            kept[1].append(factor)
        else:
            average.copy_(factor)
    return kept


def _is_finite(stack: Tensor) -> bool:
    return all(math.isfinite(value) for value in stack.aminmax())  # ten times as fast as a norm on a CPU


def _keep_finite_on_device(old: list[Tensor], new: list[Tensor]) -> None:
    """Replace what is not finite of each pair by its other half, without a word to the host."""
    old_finite, new_finite = _are_finite(old), _are_finite(new)
    for number, (average, factor) in enumerate(zip(old, new, strict=True)):
        torch.where(new_finite[number], factor, average, out=factor)
        torch.where(old_finite[number], average, factor, out=average)


def _are_finite(stacks: list[Tensor]) -> Sequence[Tensor]:
    """Whether all values of each stack are finite, scalars on its device; in few launches."""
    largest = torch._foreach_norm(stacks, float("inf"))  # a sum of squares could overflow
    return torch.stack(list(largest)).isfinite().unbind()


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Diff of Eq. 19.

    Args:
        new: A matrix or a stack of them, any shape.
        old: Its value at the previous refresh; the same shape.

    Returns:
        Scalar; 0 where both are all zeros, infinite where only the old value is.
    """
    difference: Tensor = torch.linalg.vector_norm(new - old)
    return torch.where(difference == 0, 0.0, difference / torch.linalg.vector_norm(old))

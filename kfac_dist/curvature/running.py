"""What the owner of a layer keeps: the running Fisher and what it is solved with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks.base import Block, Matrices
from kfac_dist.curvature.solvers import Solver


@dataclass
class BlockCurvature:
    """Running matrices and solvers of one block.

    Attributes:
        running: Running average of each matrix, (count, n, n); undamped.
        solvers: The damped matrices as they are solved with; empty before the first refresh.
        num_averaged: Factors that went into each running average.
    """

    block: Block
    running: Matrices = field(default_factory=dict)
    solvers: dict[str, Solver] = field(default_factory=dict)
    num_averaged: dict[str, int] = field(default_factory=dict)

    def average(self, matrix: str, factor: Tensor, decay: float | None) -> None:
        """`update_running_averages` of one factor."""
        update_running_averages([(self, matrix, factor)], decay)

    def change(self, matrix: str, factor: Tensor, decay: float | None) -> Tensor:
        """Diff (Eq. 19) of the running average that `average` would make; infinite for the first factor."""
        if matrix not in self.running:
            return factor.new_tensor(float("inf"))
        return relative_change(factor, self.running[matrix]) * self.next_weight(matrix, decay)

    def next_weight(self, matrix: str, decay: float | None) -> float:
        """Weight of the next factor in the running average."""
        count = self.num_averaged.get(matrix, 0) + 1
        return 1.0 if decay is None or count == 1 else (1 - decay) / (1 - decay**count)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values; nothing is copied."""
        return {
            "running": dict(self.running),
            "solvers": {matrix: solver.matrix for matrix, solver in self.solvers.items()},
            "inverted": [matrix for matrix, solver in self.solvers.items() if solver.is_inverse],
            "num_averaged": dict(self.num_averaged),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Replace everything by copies of what `state_dict` returned."""
        self.running = {matrix: value.to(device, dtype, copy=True) for matrix, value in state["running"].items()}
        self.solvers = {
            matrix: Solver(value.to(device, dtype, copy=True), matrix in state["inverted"])
            for matrix, value in state["solvers"].items()
        }
        self.num_averaged = dict(state["num_averaged"])


def update_running_averages(news: Sequence[tuple[BlockCurvature, str, Tensor]], decay: float | None) -> None:
    """Take new factors into their running averages, in few launches.

    The weight (1 − decay)/(1 − decay^t) of the t-th factor makes an average unbiased from the first on, which it
    equals; without decay each factor replaces the last.

    Args:
        news: Block, matrix and factor, (count, n, n), each; the factors are kept.
        decay: Share of the old average, in (0, 1), or None.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for curvature, matrix, factor in news:
        weight = curvature.next_weight(matrix, decay)
        curvature.num_averaged[matrix] = curvature.num_averaged.get(matrix, 0) + 1
        if weight == 1:
            curvature.running[matrix] = factor
            continue
        running, factors = by_weight.setdefault(weight, ([], []))
        running.append(curvature.running[matrix])
        factors.append(factor)
    for weight, (running, factors) in by_weight.items():
        torch._foreach_lerp_(running, factors, weight)


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

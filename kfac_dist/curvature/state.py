"""What the owner of a layer keeps: the running Fisher and what it is solved with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks import Block, Matrices
from kfac_dist.curvature.inverse import Solver
from kfac_dist.curvature.staleness import relative_change


@dataclass
class BlockCurvature:
    """Running matrices and solvers of one block.

    Attributes:
        running: Running average of each matrix, (count, n, n); undamped.
        solvers: The damped matrices as they are solved with; empty before the first refresh.
        num_averaged: Statistics that went into each running average.
    """

    block: Block
    running: Matrices = field(default_factory=dict)
    solvers: dict[str, Solver] = field(default_factory=dict)
    num_averaged: dict[str, int] = field(default_factory=dict)

    def average(self, matrix: str, statistic: Tensor, decay: float | None) -> None:
        """`take_averages` of one statistic."""
        take_averages([(self, matrix, statistic)], decay)

    def change(self, matrix: str, statistic: Tensor, decay: float | None) -> Tensor:
        """Diff (Eq. 19) of the running average that `average` would make; infinite for the first statistic."""
        if matrix not in self.running:
            return statistic.new_tensor(float("inf"))
        return relative_change(statistic, self.running[matrix]) * self.next_weight(matrix, decay)

    def next_weight(self, matrix: str, decay: float | None) -> float:
        """Weight of the next statistic in the running average."""
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


def take_averages(news: Sequence[tuple[BlockCurvature, str, Tensor]], decay: float | None) -> None:
    """Take new statistics into their running averages, in few launches.

    The weight (1 − decay)/(1 − decay^t) of the t-th statistic makes an average unbiased from the first on, which it
    equals; without decay each statistic replaces the last.

    Args:
        news: Block, matrix and statistic, (count, n, n), each; the statistics are kept.
        decay: Share of the old average, in (0, 1), or None.
    """
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for curvature, matrix, statistic in news:
        weight = curvature.next_weight(matrix, decay)
        curvature.num_averaged[matrix] = curvature.num_averaged.get(matrix, 0) + 1
        if weight == 1:
            curvature.running[matrix] = statistic
            continue
        running, statistics = by_weight.setdefault(weight, ([], []))
        running.append(curvature.running[matrix])
        statistics.append(statistic)
    for weight, (running, statistics) in by_weight.items():
        torch._foreach_lerp_(running, statistics, weight)

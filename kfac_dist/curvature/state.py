"""What the owner of a layer keeps: the running Fisher and what it is solved with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks import Block, Matrices
from kfac_dist.curvature.inverse import Solver, batched_cholesky
from kfac_dist.curvature.staleness import StatisticKey, relative_change

# A matrix that is not positive definite to rounding is damped tenfold, this many times at most.
_MAX_RETRIES = 3

# Iterations from which an explicit inverse pays for being formed; on a CPU 5 to more than 15, by size (benchmarks/).
INVERSE_FROM_INTERVAL = 10


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
        """Take a new statistic into the running average.

        The weight (1 − decay)/(1 − decay^t) of the t-th statistic makes the average unbiased from the first on,
        which it equals; without decay each statistic replaces the last.

        Args:
            matrix: Name of the matrix.
            statistic: (count, n, n); kept.
            decay: Share of the old average, in (0, 1), or None.
        """
        weight = self._next_weight(matrix, decay)
        self.num_averaged[matrix] = self.num_averaged.get(matrix, 0) + 1
        if weight == 1:
            self.running[matrix] = statistic
        else:
            self.running[matrix].lerp_(statistic, weight)

    def change(self, matrix: str, statistic: Tensor, decay: float | None) -> Tensor:
        """Diff (Eq. 19) of the running average that `average` would make; infinite for the first statistic."""
        if matrix not in self.running:
            return statistic.new_tensor(float("inf"))
        return relative_change(statistic, self.running[matrix]) * self._next_weight(matrix, decay)

    def _next_weight(self, matrix: str, decay: float | None) -> float:
        count = self.num_averaged.get(matrix, 0) + 1
        return 1.0 if decay is None or count == 1 else (1 - decay) / (1 - decay**count)

    def precondition(self, gradient: Tensor) -> Tensor:
        """𝒢 of a flat gradient (num_values,); the plain gradient where there is no inverse yet."""
        if self.block.stacks and not self.solvers:
            return gradient
        return self.block.precondition(gradient, self.solvers)

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


@dataclass
class RefreshReport:
    """What went wrong in a refresh: retries with more damping, and blocks that kept their previous inverse."""

    num_retries: int = 0
    num_kept: int = 0


def refresh_inverses(
    curvatures: Sequence[BlockCurvature],
    dampings: Sequence[float],
    refreshed: Mapping[str, Sequence[str]],
    expected_interval: Callable[[StatisticKey], int] = lambda key: 1,
) -> RefreshReport:
    """Factorise the damped matrices of the blocks, all of one size together.

    A block with a matrix that is not positive definite is tried again with ten times the damping, three times at
    most; after that it keeps its previous solvers.

    Args:
        curvatures: Blocks with new running averages.
        dampings: gamma of each block.
        refreshed: For each block's name the matrices to factorise.
        expected_interval: Iterations that a matrix will serve; those that serve long are inverted.

    Returns:
        Counts of retries and of blocks given up.
    """
    report = RefreshReport()
    pending = list(zip(curvatures, dampings, strict=True))
    for attempt in range(1 + _MAX_RETRIES):
        pending = _factorise(pending, 10.0**attempt, refreshed, expected_interval)
        if not pending:
            return report
        if attempt < _MAX_RETRIES:
            report.num_retries += len(pending)
    report.num_kept = len(pending)
    return report


def _factorise(
    pending: list[tuple[BlockCurvature, float]],
    multiplier: float,
    refreshed: Mapping[str, Sequence[str]],
    expected_interval: Callable[[StatisticKey], int],
) -> list[tuple[BlockCurvature, float]]:
    """Try all pending blocks in one batch a size; returns those that failed."""
    jobs: list[tuple[int, str]] = []
    stacks: list[Tensor] = []
    shifts: list[Tensor] = []
    for number, (curvature, damping) in enumerate(pending):
        block_shifts = curvature.block.shifts(curvature.running, damping * multiplier)
        for matrix in refreshed[curvature.block.name]:
            jobs.append((number, matrix))
            stacks.append(curvature.running[matrix])
            shifts.append(block_shifts[matrix])
    new_solvers: list[dict[str, Solver]] = [{} for _ in pending]
    failed: set[int] = set()
    for (number, matrix), (factors, succeeded) in zip(jobs, batched_cholesky(stacks, shifts), strict=True):
        if not succeeded:
            failed.add(number)
            continue
        solver = Solver(factors)
        serves_long = expected_interval((pending[number][0].block.name, matrix)) >= INVERSE_FROM_INTERVAL
        new_solvers[number][matrix] = solver.inverted() if serves_long else solver
    for number, (curvature, _) in enumerate(pending):
        if number not in failed:
            curvature.solvers.update(new_solvers[number])
    return [pending[number] for number in sorted(failed)]

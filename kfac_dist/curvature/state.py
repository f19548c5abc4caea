"""What the owner of a layer keeps: the running Fisher and the factors it is solved with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kfac_dist.curvature.blocks import Block, Matrices
from kfac_dist.curvature.inverse import batched_cholesky

# A matrix that is not positive definite to rounding is damped tenfold, this many times at most.
_MAX_RETRIES = 3


@dataclass
class BlockCurvature:
    """Running matrices and Cholesky factors of one block.

    Attributes:
        running: Running average of each matrix, (count, n, n); undamped.
        cholesky: Lower Cholesky factors of the damped matrices; empty before the first refresh.
        num_averaged: Statistics that went into each running average.
    """

    block: Block
    running: Matrices = field(default_factory=dict)
    cholesky: Matrices = field(default_factory=dict)
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
        count = self.num_averaged[matrix] = self.num_averaged.get(matrix, 0) + 1
        if decay is None or count == 1:
            self.running[matrix] = statistic
        else:
            self.running[matrix].lerp_(statistic, (1 - decay) / (1 - decay**count))

    def precondition(self, gradient: Tensor) -> Tensor:
        """𝒢 of a flat gradient (num_values,); the plain gradient where there is no inverse yet."""
        if self.block.stacks and not self.cholesky:
            return gradient
        return self.block.precondition(gradient, self.cholesky)


@dataclass
class RefreshReport:
    """What went wrong in a refresh: retries with more damping, and blocks that kept their previous inverse."""

    num_retries: int = 0
    num_kept: int = 0


def refresh_inverses(
    curvatures: Sequence[BlockCurvature],
    dampings: Sequence[float],
    refreshed: Mapping[str, Sequence[str]],
) -> RefreshReport:
    """Factorise the damped matrices of the blocks, all of one size together.

    A block with a matrix that is not positive definite is tried again with ten times the damping, three times at
    most; after that it keeps its previous factors.

    Args:
        curvatures: Blocks with new running averages.
        dampings: gamma of each block.
        refreshed: For each block's name the matrices to factorise.

    Returns:
        Counts of retries and of blocks given up.
    """
    report = RefreshReport()
    pending = list(zip(curvatures, dampings, strict=True))
    for attempt in range(1 + _MAX_RETRIES):
        pending = _factorise(pending, 10.0**attempt, refreshed)
        if not pending:
            return report
        if attempt < _MAX_RETRIES:
            report.num_retries += len(pending)
    report.num_kept = len(pending)
    return report


def _factorise(
    pending: list[tuple[BlockCurvature, float]], multiplier: float, refreshed: Mapping[str, Sequence[str]]
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
    new_factors: list[Matrices] = [{} for _ in pending]
    failed: set[int] = set()
    for (number, matrix), (factors, succeeded) in zip(jobs, batched_cholesky(stacks, shifts), strict=True):
        new_factors[number][matrix] = factors
        if not succeeded:
            failed.add(number)
    for number, (curvature, _) in enumerate(pending):
        if number not in failed:
            curvature.cholesky.update(new_factors[number])
    return [pending[number] for number in sorted(failed)]

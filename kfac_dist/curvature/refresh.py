"""Stage 4: the damped matrices of many blocks factorised together, and what happens where that fails.

Whether a matrix was positive definite is known on the device first. A CPU's answer is read at once, and a block that
failed is tried again at once. A GPU's is read at the next refresh or step, when it is there, so that the host never
waits for the device; until then the device itself keeps such a block's previous solvers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.inverse import Solver, batched_cholesky
from kfac_dist.curvature.staleness import StatisticKey
from kfac_dist.curvature.state import BlockCurvature
from kfac_dist.transfer import HostCopy

# A matrix that is not positive definite to rounding is damped tenfold, this many times at most.
_MAX_RETRIES = 3

# Iterations from which an explicit inverse pays for being formed; on a CPU 5 to more than 15, by size (benchmarks/).
INVERSE_FROM_INTERVAL = 10


@dataclass(frozen=True)
class Job:
    """A block whose matrices are to be factorised.

    Attributes:
        curvature: The block's running averages, and where its solvers go.
        damping: gamma.
        matrices: Names of those to factorise.
        num_failures: Times that it has failed before.
    """

    curvature: BlockCurvature
    damping: float
    matrices: Sequence[str]
    num_failures: int = 0

    @property
    def name(self) -> str:
        """The block's name."""
        return self.curvature.block.name


@dataclass
class RefreshReport:
    """What went wrong in a refresh: retries with more damping, and blocks that kept their previous inverse."""

    num_retries: int = 0
    num_kept: int = 0


class InverseRefresh:
    """Factorises, and remembers what to try again."""

    def __init__(self, deferred: bool = False) -> None:
        """Start with nothing to try again.

        Args:
            deferred: Whether to read what failed at the next call rather than at once.
        """
        self._deferred = deferred
        self._report = RefreshReport()
        self._again: list[Job] = []
        self._tried: list[Job] = []
        self._failed: HostCopy | None = None  # (jobs tried,) bool

    def refresh(
        self, jobs: Sequence[Job], expected_interval: Callable[[StatisticKey], int] = lambda key: 1
    ) -> RefreshReport:
        """Factorise the damped matrices of the blocks, all of one size together.

        A block with a matrix that is not positive definite is tried again with ten times the damping, three times at
        most; after that it keeps its previous solvers.

        Args:
            jobs: Blocks with new running averages; call without any where nothing is refreshed, so that what failed
                in the last call is tried again.
            expected_interval: Iterations that a matrix will serve; those that serve long are inverted.

        Returns:
            Counts of retries and of blocks given up since the last call.
        """
        self._read_failures()
        pending = _merge(self._again, jobs)
        self._again = []
        while pending:
            self._factorise(pending, expected_interval)
            if self._deferred:
                break
            self._read_failures()
            pending, self._again = self._again, []
        report, self._report = self._report, RefreshReport()
        return report

    def state_dict(self) -> dict[str, Any]:
        """What is to be tried again: for each block's name its damping, matrices and failures."""
        self._read_failures()
        return {job.name: (job.damping, list(job.matrices), job.num_failures) for job in self._again}

    def load_state_dict(self, state: Mapping[str, Any], curvatures: Mapping[str, BlockCurvature]) -> None:
        """Restore what `state_dict` returned; `curvatures` are this rank's blocks by name."""
        self._tried, self._failed = [], None
        self._again = [Job(curvatures[name], *settings) for name, settings in state.items()]

    def _factorise(self, jobs: Sequence[Job], expected_interval: Callable[[StatisticKey], int]) -> None:
        """Try all jobs, one batch a size; the solvers of those that succeed are replaced."""
        stacks: list[Tensor] = []
        shifts: list[Tensor] = []
        for job in jobs:
            block_shifts = job.curvature.block.shifts(job.curvature.running, job.damping * 10.0**job.num_failures)
            stacks += [job.curvature.running[matrix] for matrix in job.matrices]
            shifts += [block_shifts[matrix] for matrix in job.matrices]
        results = iter(batched_cholesky(stacks, shifts))
        factors = [{matrix: next(results) for matrix in job.matrices} for job in jobs]
        failed = torch.stack([torch.stack([failure for _, failure in job.values()]).any() for job in factors])
        self._tried, self._failed = list(jobs), HostCopy(failed)
        known = None if self._deferred else self._failed.read()
        for number, job in enumerate(jobs):
            if known is not None and known[number]:
                continue
            solvers = job.curvature.solvers
            for matrix, (factor, _) in factors[number].items():
                solver = Solver.create(factor, expected_interval((job.name, matrix)) >= INVERSE_FROM_INTERVAL)
                if known is None:
                    solver = solver.unless(failed[number], solvers.get(matrix, Solver.identity(factor)))
                solvers[matrix] = solver

    def _read_failures(self) -> None:
        """Sort out which blocks of the last try are to be tried again."""
        if self._failed is None:
            return
        for job, failed in zip(self._tried, self._failed.read().tolist(), strict=True):
            if failed and job.num_failures == _MAX_RETRIES:
                self._report.num_kept += 1
            elif failed:
                self._report.num_retries += 1
                self._again.append(replace(job, num_failures=job.num_failures + 1))
        self._tried, self._failed = [], None


def _merge(again: Sequence[Job], new: Sequence[Job]) -> list[Job]:
    """New jobs and old ones; a block in both is tried once, with its new settings and the old one's failures."""
    failures = {job.name: job for job in again}
    merged = []
    for job in new:
        old = failures.pop(job.name, None)
        if old is not None:
            matrices = [*job.matrices, *(matrix for matrix in old.matrices if matrix not in job.matrices)]
            job = replace(job, matrices=matrices, num_failures=old.num_failures)
        merged.append(job)
    return [*merged, *failures.values()]

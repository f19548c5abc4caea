"""Stage 4: the damped matrices of many blocks factorised together, and what happens where that fails.

Whether a matrix was positive definite is known on the device first. A CPU's answer is read at once, and a block that
failed is tried again at once. A GPU's is read at the next refresh or step, when it is there, so that the host never
waits for the device; until then the device itself keeps such a block's previous solvers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.curvature.blocks.base import Block, FactorKey, Matrices
from kfac_dist.curvature.running import BlockCurvature
from kfac_dist.curvature.solvers import Solver, StackBatches, mean_diagonals
from kfac_dist.tensors.host_copy import HostCopy, to_device

# A matrix that is not positive definite to rounding is damped tenfold, this many times at most.
_MAX_RETRIES = 3

# Iterations from which an inverse pays for being formed, whatever its size. That of a matrix that is solved with many
# columns at once pays sooner: as soon as it has served as many columns as it has rows (benchmarks/results/, on a CPU).
MIN_INTERVAL_FOR_INVERSE = 10


def pays_to_invert(block: Block, matrix: str, interval: int) -> bool:
    """Whether a matrix is kept as its inverse rather than as its Cholesky factor.

    Args:
        block: The block.
        matrix: Name of its matrix.
        interval: Iterations that it will serve.
    """
    count, size = block.factor_shapes[matrix]
    columns = block.num_values // (count * size)  # of the gradient, all of which are solved in each iteration
    return interval >= MIN_INTERVAL_FOR_INVERSE or interval * columns >= size


@dataclass(frozen=True)
class InversionTask:
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

    def __post_init__(self) -> None:
        """Refuse a damping that cannot work, which a schedule may have set."""
        if not self.damping > 0:
            raise ValueError(f"damping must be > 0, got {self.damping}")

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
        self._again: list[InversionTask] = []
        self._tried: list[InversionTask] = []
        self._failed: HostCopy | None = None  # (tasks tried,) bool

    def refresh(
        self, tasks: Sequence[InversionTask], expected_interval: Callable[[FactorKey], int] = lambda key: 1
    ) -> RefreshReport:
        """Factorise the damped matrices of the blocks, all of one size together.

        A block with a matrix that is not positive definite is tried again with ten times the damping, three times at
        most; after that it keeps its previous solvers.

        Args:
            tasks: Blocks with new running averages; call without any where nothing is refreshed, so that what failed
                in the last call is tried again.
            expected_interval: Iterations that a matrix will serve; those that serve long are inverted.

        Returns:
            Counts of retries and of blocks given up since the last call.
        """
        self._read_failures()
        pending = _merge(self._again, tasks)
        self._again = []
        while pending:
            self._factorise(pending, expected_interval)
            if self._deferred:
                break
            self._read_failures()
            pending, self._again = self._again, []
        report, self._report = self._report, RefreshReport()
        return report

    def forget_all_but(self, curvatures: Iterable[BlockCurvature]) -> None:
        """Try nothing again of other blocks, which are gone."""
        self._read_failures()
        kept = {id(curvature) for curvature in curvatures}
        self._again = [task for task in self._again if id(task.curvature) in kept]

    def state_dict(self) -> dict[str, Any]:
        """What is to be tried again: for each block's name its damping, matrices and failures."""
        self._read_failures()
        return {task.name: (task.damping, list(task.matrices), task.num_failures) for task in self._again}

    def load_state_dict(self, state: Mapping[str, Any], curvatures: Mapping[str, BlockCurvature]) -> None:
        """Restore what `state_dict` returned; `curvatures` are this rank's blocks by name."""
        self._tried, self._failed = [], None
        self._again = [InversionTask(curvatures[name], *settings) for name, settings in state.items()]

    def _factorise(self, tasks: Sequence[InversionTask], expected_interval: Callable[[FactorKey], int]) -> None:
        """Try all tasks, one batch a size; the solvers of those that succeed take over the new values.

        They keep their memory: blocks of one shape share it, and on a large network another copy of all is much.
        """
        keys = [(number, matrix) for number, task in enumerate(tasks) for matrix in task.matrices]
        solvers, failed = _factorised(tasks, keys)
        self._tried, self._failed = list(tasks), HostCopy(failed)
        inverts = [
            solver.is_inverse
            or pays_to_invert(tasks[number].curvature.block, matrix, expected_interval((tasks[number].name, matrix)))
            for (number, matrix), solver in zip(keys, solvers, strict=True)
        ]
        changes_form = any(
            (old := tasks[number].curvature.solvers.get(matrix)) is not None and old.is_inverse != is_inverse
            for (number, matrix), is_inverse in zip(keys, inverts, strict=True)
        )
        # The device cannot choose between two forms: then, once in many refreshes, the host waits for the answer.
        known = self._failed.read().tolist() if changes_form or not self._deferred else None
        failed_by_task = failed.unbind()
        for (number, matrix), is_inverse in zip(keys, inverts, strict=True):
            # One by one, so that factors and old solvers of those before are gone when a large one's inverse is formed.
            old, new = tasks[number].curvature.solvers.get(matrix), solvers.pop(0)
            if known is not None and known[number]:
                continue  # a factor with a zero on its diagonal, which a CPU refuses to invert
            new = new.inverted() if is_inverse else new
            failed_here = failed_by_task[number] if known is None else None
            if old is not None and old.is_inverse == is_inverse:
                old.overwrite(new, failed_here)
            else:
                tasks[number].curvature.solvers[matrix] = new if failed_here is None else new.unless(failed_here)

    def _read_failures(self) -> None:
        """Sort out which blocks of the last try are to be tried again."""
        if self._failed is None:
            return
        for task, failed in zip(self._tried, self._failed.read().tolist(), strict=True):
            if failed and task.num_failures == _MAX_RETRIES:
                self._report.num_kept += 1
            elif failed:
                self._report.num_retries += 1
                self._again.append(replace(task, num_failures=task.num_failures + 1))
        self._tried, self._failed = [], None


def _factorised(tasks: Sequence[InversionTask], keys: Sequence[tuple[int, str]]) -> tuple[list[Solver], Tensor]:
    """Cholesky factors of the damped matrices, of tiny ones inverses; and which tasks failed, (tasks,) bool."""
    batches = StackBatches([tasks[number].curvature.running[matrix] for number, matrix in keys])
    shifts = _shifts(tasks, dict(zip(keys, batches.mean_diagonals(), strict=True)))
    batches.add_to_diagonals([shifts[key] for key in keys])
    solvers, stack_failed = batches.factorise()
    # A block has one matrix or two, next to each other; its first and its last between them are all.
    first = {number: index for index, (number, _) in reversed(list(enumerate(keys)))}
    last = {number: index for index, (number, _) in enumerate(keys)}
    flags = stack_failed.unbind()
    failed = torch.stack([flags[first[number]] for number in range(len(tasks))]) | torch.stack(
        [flags[last[number]] for number in range(len(tasks))]
    )
    return solvers, failed


def _merge(again: Sequence[InversionTask], new: Sequence[InversionTask]) -> list[InversionTask]:
    """New tasks and old ones; a block in both is tried once, with its new settings and the old one's failures."""
    failures = {task.name: task for task in again}
    merged = []
    for task in new:
        old = failures.pop(task.name, None)
        if old is not None:
            matrices = [*task.matrices, *(matrix for matrix in old.matrices if matrix not in task.matrices)]
            task = replace(task, matrices=matrices, num_failures=old.num_failures)
        merged.append(task)
    return [*merged, *failures.values()]


def _shifts(
    tasks: Sequence[InversionTask], known_means: Mapping[tuple[int, str], Tensor]
) -> dict[tuple[int, str], Tensor]:
    """What damping adds to the diagonals of each task's matrices, (count,); computed for all like blocks at once.

    Args:
        tasks: The blocks.
        known_means: Mean diagonal entries, (count,), of matrices by number of the task and name; those of a matrix
            that is not refreshed with its partner are found here.
    """
    groups: dict[Callable[[Matrices, Tensor], Matrices], list[int]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault(task.curvature.block.shifts, []).append(number)
    shifts: dict[tuple[int, str], Tensor] = {}
    for shifts_of, numbers in groups.items():
        curvatures = [tasks[number].curvature for number in numbers]
        counts = [next(iter(curvature.block.factor_shapes.values()))[0] for curvature in curvatures]
        means = {}
        for matrix in curvatures[0].block.factor_shapes:
            parts = []
            for number, curvature in zip(numbers, curvatures, strict=True):
                known = known_means.get((number, matrix))
                parts.append(known if known is not None else mean_diagonals(curvature.running[matrix]))
            means[matrix] = torch.cat(parts)
        like = next(iter(means.values()))
        dampings = [tasks[number].damping * 10.0 ** tasks[number].num_failures for number in numbers]
        # On the host whatever torch's default device is: what is there already cannot be pinned.
        repeats = torch.tensor(counts, device="cpu")
        damping = torch.tensor(dampings, dtype=like.dtype, device="cpu").repeat_interleave(repeats)
        for matrix, values in shifts_of(means, to_device(damping, like.device)).items():
            shifts |= zip([(number, matrix) for number in numbers], values.split(counts), strict=True)
    return shifts

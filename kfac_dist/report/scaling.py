"""Iterations to a target against the batch size, and where they leave the ideal line.

Ideal scaling: twice the batch, half the iterations. The line is anchored at the smallest batch size that reached the
target. Excess is iterations divided by ideal iterations: 1 on the line, above it with diminishing returns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kfac_dist.report.best import Spread, other_seeds
from kfac_dist.report.curve import Array, number
from kfac_dist.report.results import Cell, Study, Trial

TOLERANCE = 0.2
"""The critical batch size is where iterations exceed the ideal by this share."""


@dataclass(frozen=True)
class Scaling:
    """Fewest iterations to a target for each batch size.

    Attributes:
        batch_sizes: Ascending, (n,).
        iterations: (n,); infinite where no run reached the target.
        searched: (n,), the iterations of the longest run: a target that was not reached takes more than these.
    """

    batch_sizes: Array
    iterations: Array
    searched: Array

    @property
    def anchor(self) -> int | None:
        """Index of the smallest batch size that reached the target."""
        reached = np.flatnonzero(np.isfinite(self.iterations))
        return int(reached[0]) if reached.size else None

    def ideal(self, anchor: int | None = None) -> Array:
        """Iterations of ideal scaling, (n,), through the point of this index (`anchor`)."""
        anchor = self.anchor if anchor is None else anchor
        if anchor is None:
            return np.full_like(self.iterations, np.nan)
        return np.asarray(self.iterations[anchor] * self.batch_sizes[anchor] / self.batch_sizes)

    def excess(self, anchor: int | None = None) -> Array:
        """Iterations divided by the ideal, (n,)."""
        return self.iterations / self.ideal(anchor)

    def least_excess(self, anchor: int | None = None) -> Array:
        """The excess where the target was reached, elsewhere what it exceeds for certain, (n,)."""
        least = np.where(np.isfinite(self.iterations), self.iterations, self.searched)
        return np.asarray(least / self.ideal(anchor))


@dataclass(frozen=True)
class CriticalBatch:
    """Where scaling leaves the ideal line.

    Attributes:
        value: The batch size; None where only bounds are known.
        above: The largest batch size known to be on the line; None if there is no line.
        below: The smallest one known to have left it; None if none has.
    """

    value: float | None
    above: float | None
    below: float | None

    def __str__(self) -> str:
        if self.above is None:
            return "unknown"
        if self.value is not None:
            return f"{self.value:,.0f}"
        if self.below is None:
            return f"> {self.above:,.0f}"
        return f"{self.above:,.0f} … {self.below:,.0f}"


def critical_batch(scaling: Scaling, tolerance: float = TOLERANCE) -> CriticalBatch:
    """The batch size at which iterations exceed the ideal by `tolerance`.

    The logarithm of the excess is interpolated linearly in the logarithm of the batch size, between the last batch
    size known to be within the tolerance and the next known not to be. If that one never reached the target there are
    only bounds. One that did not reach it within the tolerance, for its runs were no longer, is on neither side.
    """
    anchor = scaling.anchor
    if anchor is None:
        return CriticalBatch(None, None, None)
    sizes, excess = scaling.batch_sizes, scaling.excess()
    left = np.flatnonzero(scaling.least_excess() > 1 + tolerance)
    left = left[left > anchor]
    end = int(left[0]) if left.size else sizes.size
    last = int(np.flatnonzero(np.isfinite(excess[:end]))[-1])
    low = float(sizes[last])
    if not left.size:
        return CriticalBatch(None, low if last > anchor else None, None)  # one point is no line
    high = float(sizes[end])
    if not math.isfinite(excess[end]):
        return CriticalBatch(None, low, high)
    share = math.log((1 + tolerance) / excess[last]) / math.log(excess[end] / excess[last])
    return CriticalBatch(low * (high / low) ** share, low, high)


def fastest(trials: Sequence[Trial], target: str) -> Trial | None:
    """The run that reached the target in the fewest iterations; None if none did."""
    reached = [trial for trial in trials if trial.iterations_to.get(target) is not None]
    return min(reached, key=lambda trial: trial.iterations_to[target] or 0, default=None)


def spread_to(study: Study, cell: Cell, target: str) -> Spread | None:
    """Iterations to the target over the seeds of the configuration that is fastest on the grid; None if none is."""
    chosen = fastest(study.grid(cell), target)
    if chosen is None:
        return None
    runs = [chosen, *other_seeds(study, chosen)]
    return Spread(tuple(number(trial.iterations_to.get(target)) for trial in runs))


def scaling_of(study: Study, model: str, optimizer: str, target: str) -> Scaling:
    """Fewest iterations of a grid to the target, at each batch size that has results."""
    sizes, iterations, searched = [], [], []
    for size in study.batch_sizes:
        grid = study.grid(Cell(model, size, optimizer))
        if grid:
            trial = fastest(grid, target)
            sizes.append(float(size))
            iterations.append(math.inf if trial is None else float(trial.iterations_to[target] or 0))
            searched.append(max((float(trial.iterations) for trial in grid if trial.is_done), default=0.0))
    return Scaling(np.array(sizes), np.array(iterations), np.array(searched))


def readable_target(target: str) -> str:
    """``train_loss<=0.5`` as a reader would say it."""
    for metric, name in (("train_loss", "training loss"), ("test_top1", "test accuracy")):
        target = target.replace(metric, f"{name} ")
    return target.replace("<=", "≤ ").replace(">=", "≥ ").replace("  ", " ").strip()

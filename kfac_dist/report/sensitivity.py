"""How much of a grid is good, at the whole budget, at fixed epochs and at fixed iterations, and what is tilted there.

A configuration is good if its test accuracy is within `WITHIN` of the best: at least (1 − WITHIN) times it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfac_dist.report.curve import Array, Axis
from kfac_dist.report.results import Cell, Study, Trial

WITHIN = 0.05
RATE = "learning_rate"


@dataclass(frozen=True)
class Grid:
    """Test accuracies over learning rate and another parameter.

    Attributes:
        other: Name of the other parameter; empty if there is none.
        rates: Ascending, (n,).
        others: Ascending, (m,).
        all_top1: Fractions, (k, m, n), with parameters beyond these two in k combinations of their values; 0 where
            training diverged, not a number where there is no result.
    """

    other: str
    rates: Array
    others: Array
    all_top1: Array

    @property
    def top1(self) -> Array:
        """The best over parameters beyond these two, (m, n)."""
        best: Array = np.fmax.reduce(self.all_top1)
        return best

    @property
    def best(self) -> float:
        """The highest accuracy; not a number without results."""
        return float(np.nanmax(self.all_top1)) if np.isfinite(self.all_top1).any() else math.nan

    def good(self, best: float | None = None) -> NDArray[np.bool_]:
        """Which configurations are within `WITHIN` of the best: of this grid, or of the given one. (k, m, n)."""
        level = (1 - WITHIN) * (self.best if best is None else best) - 1e-9  # for rounding
        good: NDArray[np.bool_] = (self.all_top1 >= level) & (level > 0)
        return good

    def share(self, best: float | None = None) -> float:
        """The share of the configurations with a result that is good."""
        known = int(np.isfinite(self.all_top1).sum())
        return int(self.good(best).sum()) / known if known else math.nan


def make_grid(values: Iterable[tuple[Mapping[str, float], float]]) -> Grid:
    """A grid from parameters and accuracies; parameters without a learning rate give an empty one."""
    points = [(parameters, top1) for parameters, top1 in values if RATE in parameters]
    names = sorted({name for parameters, _ in points for name in parameters} - {RATE})
    other = next((name for name in ("damping", "momentum") if name in names), names[0] if names else "")
    rates = sorted({parameters[RATE] for parameters, _ in points})
    others = sorted({parameters.get(other, 0.0) for parameters, _ in points})
    rest = [
        tuple(sorted(item for item in parameters.items() if item[0] not in (RATE, other))) for parameters, _ in points
    ]
    layers = sorted(set(rest)) or [()]
    top1 = np.full((len(layers), len(others), len(rates)), np.nan)
    for (parameters, value), layer in zip(points, rest, strict=True):
        place = layers.index(layer), others.index(parameters.get(other, 0.0)), rates.index(parameters[RATE])
        top1[place] = np.fmax(top1[place], value)
    return Grid(other, np.array(rates), np.array(others), top1)


def final_grid(trials: Sequence[Trial]) -> Grid:
    """Accuracies at the end of the runs."""
    return make_grid((trial.parameters, trial.test_top1) for trial in trials)


@dataclass(frozen=True)
class Fixed:
    """Grids at one place of an axis, the same for several batch sizes.

    Attributes:
        axis: epoch or iteration.
        place: The number of epochs or iterations.
        grids: Batch size → grid; a size is missing if its runs were not evaluated so early or ended before.
    """

    axis: Axis
    place: float
    grids: Mapping[int, Grid]


def fixed_budget(study: Study, model: str, optimizer: str, axis: Axis) -> Fixed:
    """The grids of all batch sizes after the same number of epochs or iterations, from the runs' curves.

    Of the lengths that runs have, that one is taken at which most batch sizes can be compared, the longest of equals.
    A run's learning rate and damping follow the schedule of its own whole budget, not of this part. Where all have that
    length by the study's budget, the values are those at the end.
    """
    trials = {size: study.grid(Cell(model, size, optimizer)) for size in study.batch_sizes}
    if study.fixed_budget is not None and study.fixed_budget[0] == axis:
        return Fixed(axis, study.fixed_budget[1], {size: final_grid(runs) for size, runs in trials.items() if runs})
    spans = {size: span for size, runs in trials.items() if (span := _span(runs, axis)) is not None}
    if not spans:
        return Fixed(axis, math.nan, {})

    def sizes_at(place: float) -> list[int]:
        return [size for size, (start, end) in spans.items() if start <= place * (1 + 1e-9) and place <= end]

    place = max((end for _, end in spans.values()), key=lambda end: (len(sizes_at(end)), end))
    grids = {
        size: make_grid((trial.parameters, _top1_at(trial, axis, place)) for trial in trials[size])
        for size in sizes_at(place)
    }
    return Fixed(axis, place, grids)


def _span(trials: Sequence[Trial], axis: Axis) -> tuple[float, float] | None:
    """First and last evaluation that all finished runs have; None if none has any."""
    places = [trial.curve.known(axis, "test_top1")[0] for trial in trials if trial.is_done]
    places = [known for known in places if known.size]
    if not places:
        return None
    return max(float(known[0]) for known in places), min(float(known[-1]) for known in places)


def _top1_at(trial: Trial, axis: Axis, place: float) -> float:
    value = float(trial.curve.at(axis, place, "test_top1"))
    return 0.0 if math.isnan(value) and not trial.is_done else value  # it diverged before


def good_points(grid: Grid) -> tuple[Array, Array]:
    """log10 of learning rate and of the other parameter at each good configuration, (k,) each.

    Empty where the other parameter has no logarithm (a momentum of 0).
    """
    if not grid.others.size or grid.others[0] <= 0 or grid.rates[0] <= 0:
        return np.empty(0), np.empty(0)
    _, rows, columns = np.nonzero(grid.good())
    return np.log10(grid.rates[columns]), np.log10(grid.others[rows])


def correlation(x: Array, y: Array) -> float:
    """Pearson's correlation; not a number with fewer than 3 points or where one of both does not vary."""
    return pooled_correlation([(x, y)])[0] if x.size >= 3 else math.nan


def pooled_correlation(groups: Sequence[tuple[Array, Array]]) -> tuple[float, float, float]:
    """Pearson's correlation within groups, and its 95 % interval by Fisher's z.

    Each group is centred at its own mean, so that groups at different places do not correlate by that. Each mean
    costs a degree of freedom: the interval counts Σ(n − 1) + 1 points.

    Returns:
        Correlation, lower and upper bound; all not-a-number where it is not defined, the bounds also with fewer than
        4 points.
    """
    xx = yy = xy = 0.0
    count = 1
    for x, y in groups:
        if x.size < 2:
            continue
        dx, dy = x - x.mean(), y - y.mean()
        xx, yy, xy = xx + float(dx @ dx), yy + float(dy @ dy), xy + float(dx @ dy)
        count += x.size - 1
    if xx <= 1e-12 or yy <= 1e-12:
        return math.nan, math.nan, math.nan
    r = max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))
    if count < 4:
        return r, math.nan, math.nan
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.959964 / math.sqrt(count - 3)
    return r, math.tanh(z - half), math.tanh(z + half)


def trend(values: Sequence[float]) -> float:
    """Kendall's tau-a against the order: 1 if every value is above all before, −1 if below; pairs of equals count 0."""
    pairs = [(a, b) for index, a in enumerate(values) for b in values[index + 1 :]]
    return sum(np.sign(b - a) for a, b in pairs) / len(pairs) if pairs else math.nan

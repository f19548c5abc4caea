"""The best configuration of each cell, and what other seeds say of it.

A configuration is chosen on the grid's seed alone, because only there all configurations were tried; the value told
of it is the mean over all its seeds. Choosing looks at the test images, as in the poster.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kfac_dist.report.curve import Curve
from kfac_dist.report.results import Cell, Study, Trial
from kfac_dist.vocabulary import FinalMetric


@dataclass(frozen=True)
class Spread:
    """A value over seeds; ``str`` gives the mean and, with several seeds, lowest and highest."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the finite values; not a number without any."""
        finite = [value for value in self.values if math.isfinite(value)]
        return float(np.mean(finite)) if finite else math.nan

    @property
    def lowest(self) -> float:
        """Likewise."""
        return min((value for value in self.values if math.isfinite(value)), default=math.nan)

    @property
    def highest(self) -> float:
        """Likewise."""
        return max((value for value in self.values if math.isfinite(value)), default=math.nan)

    def scaled(self, factor: float) -> "Spread":
        """In another unit."""
        return Spread(tuple(value * factor for value in self.values))


@dataclass(frozen=True)
class Best:
    """A cell's best configuration.

    Attributes:
        trials: Its runs, the grid's seed first.
        at_edge: Parameters whose value is the lowest or highest of the grid: the optimum may lie outside.
    """

    trials: tuple[Trial, ...]
    at_edge: tuple[str, ...]

    @property
    def chosen(self) -> Trial:
        """The run that it was chosen by."""
        return self.trials[0]

    @property
    def curves(self) -> list[Curve]:
        """Of its runs."""
        return [trial.curve for trial in self.trials]

    def spread(self, final: FinalMetric) -> Spread:
        """The final value over its seeds."""
        return Spread(tuple(getattr(trial, final) for trial in self.trials))


def best_of(study: Study, cell: Cell, final: FinalMetric = "test_top1") -> Best | None:
    """The configuration with the best final value on the grid's seed; None if no trial came to its end."""
    grid = [trial for trial in study.grid(cell) if trial.is_done and math.isfinite(getattr(trial, final))]
    if not grid:
        return None
    sign = -1.0 if final == "test_top1" else 1.0
    chosen = min(grid, key=lambda trial: sign * getattr(trial, final))
    return Best((chosen, *other_seeds(study, chosen)), _at_edge(chosen, study.grid(cell)))


def other_seeds(study: Study, chosen: Trial) -> list[Trial]:
    """Runs of the same configuration with other seeds."""
    trials = study.seeds_of(chosen.cell)
    return [trial for trial in trials if trial.parameters == chosen.parameters and trial.seed != chosen.seed]


def _at_edge(chosen: Trial, grid: Sequence[Trial]) -> tuple[str, ...]:
    edges = []
    for name, value in chosen.parameters.items():
        values = {trial.parameters[name] for trial in grid if name in trial.parameters}
        if len(values) > 2 and value in (min(values), max(values)):
            edges.append(name)
    return tuple(edges)


@dataclass(frozen=True)
class Reached:
    """When runs reached a level: the mean over those that did."""

    epochs: float
    iterations: float
    seconds: float
    num_reached: int
    num_runs: int


def time_to(trials: Iterable[Trial], level: float) -> Reached:
    """When these runs were first found at a test accuracy, a fraction; means over those that were.

    A run that diverged afterwards reached nothing.
    """
    trials = list(trials)
    places = [(trial.curve, trial.curve.reaches("test_top1", level)) for trial in trials if trial.is_done]
    found = [(curve.epoch[i], curve.iteration[i], curve.seconds[i]) for curve, i in places if i is not None]
    epochs, iterations, seconds = np.mean(found, axis=0).tolist() if found else (math.nan, math.nan, math.nan)
    return Reached(epochs, iterations, seconds, len(found), len(trials))


def fastest_to(trials: Iterable[Trial], level: float) -> Reached:
    """The same for that one of these runs which needs the fewest epochs, of equals the fewest seconds."""
    reached = [one for one in (time_to([trial], level) for trial in trials) if one.num_reached]
    return min(reached, key=lambda one: (one.epochs, one.seconds), default=time_to([], level))

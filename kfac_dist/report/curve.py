"""What one run measured, evaluation by evaluation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Axis = Literal["iteration", "epoch", "seconds"]
Metric = Literal["train_loss", "test_loss", "test_top1"]

MOST_UNEVEN = 1.25
"""Runs of one configuration that differ by more in seconds an iteration did not have the machine alike."""


@dataclass(frozen=True)
class Curve:
    """A run's evaluations, (n,) each, in order; not a number where one was not made.

    Attributes:
        iteration: Updates made so far.
        epoch: Passes over the training images so far, fractional.
        seconds: Of training so far, evaluations left out.
        train_loss: Mean cross-entropy since the evaluation before, in nats.
        test_loss: Cross-entropy, in nats.
        test_top1: Fraction, 0 … 1.
    """

    iteration: Array
    epoch: Array
    seconds: Array
    train_loss: Array
    test_loss: Array
    test_top1: Array

    @classmethod
    def from_points(cls, points: Iterable[Mapping[str, Any]]) -> "Curve":
        """A curve from one mapping for each evaluation; None and missing fields become not-a-number."""
        points = list(points)
        columns = {
            name: np.array([number(point.get(name)) for point in points], dtype=np.float64)
            for name in cls.__dataclass_fields__
        }
        return cls(**columns)

    def along(self, axis: Axis) -> Array:
        """The curve's places on an axis, (n,)."""
        places: Array = getattr(self, axis)
        return places

    def known(self, axis: Axis, metric: Metric) -> tuple[Array, Array]:
        """Places and values where the metric was measured, (m,) each."""
        places, values = self.along(axis), getattr(self, metric)
        measured = np.isfinite(places) & np.isfinite(values)
        return places[measured], values[measured]

    def at(self, axis: Axis, places: Array | float, metric: Metric) -> Array:
        """The metric between evaluations, by linear interpolation; not a number before the first and after the last."""
        known, values = self.known(axis, metric)
        wanted = np.asarray(places, dtype=np.float64)
        if not known.size:
            return np.full_like(wanted, np.nan)
        result: Array = np.interp(wanted, known, values, left=np.nan, right=np.nan)
        return result

    def reaches(self, metric: Metric, level: float) -> int | None:
        """Index of the first evaluation that is at least as good as the level; None if none is.

        An accuracy is reached from below, a loss from above.
        """
        values = getattr(self, metric)
        rounding = 1e-12  # of a level that is a mean
        good = values >= level - rounding if metric == "test_top1" else values <= level + rounding
        return int(np.argmax(good)) if good.any() else None


def uneven_pace(curves: Iterable[Curve]) -> tuple[float, float] | None:
    """Fewest and most seconds an iteration of runs of one configuration, if they differ more than such runs do."""
    paces = [curve.seconds[-1] / curve.iteration[-1] for curve in curves if curve.iteration.size]
    known = [float(pace) for pace in paces if np.isfinite(pace)]
    if not known or max(known) <= MOST_UNEVEN * min(known):
        return None
    return min(known), max(known)


def number(value: object) -> float:
    """A JSON value as a float; None, and what is no number, as not-a-number. "Infinity" is read as such."""
    try:
        return float(value) if isinstance(value, int | float | str) else float("nan")
    except ValueError:
        return float("nan")

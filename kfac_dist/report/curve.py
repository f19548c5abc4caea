"""What one run measured, evaluation by evaluation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Axis = Literal["iteration", "epoch", "seconds"]
Metric = Literal["train_loss", "test_loss", "test_top1"]


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
        good = values >= level if metric == "test_top1" else values <= level
        return int(np.argmax(good)) if good.any() else None


def number(value: object) -> float:
    """A JSON value as a float; None, and what is no number, as not-a-number. "Infinity" is read as such."""
    try:
        return float(value) if isinstance(value, int | float | str) else float("nan")
    except ValueError:
        return float("nan")

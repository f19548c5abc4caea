"""Several runs that differ by their seed, as one line with a band."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from kfac_dist.report.curve import Array, Axis, Curve, Metric
from kfac_dist.report.pictures import Look, log_axis

AXIS_NAMES = {"epoch": "epoch", "iteration": "iteration", "seconds": "seconds of training"}
METRIC_NAMES = {
    "train_loss": "training loss (nats)",
    "test_loss": "test loss (nats)",
    "test_top1": "test accuracy (%)",
}

UNEVEN = 1.25
"""Runs of the same settings whose seconds an iteration differ by more were disturbed."""


def mean_and_range(curves: Sequence[Curve], axis: Axis, metric: Metric) -> tuple[Array, Array, Array, Array]:
    """Mean, lowest and highest of a metric over runs, where all of them have it.

    Curves are interpolated linearly to the places at which the first one was evaluated. By the clock they are compared
    after the same iterations, at their mean seconds, so that a slow moment of one run is not taken for a difference in
    what it learned.

    Returns:
        Places, means, lowest and highest, (n,) each; empty without curves.
    """
    if axis == "seconds":
        iterations, mean, low, high = mean_and_range(curves, "iteration", metric)
        seconds = [np.interp(iterations, curve.iteration, curve.seconds) for curve in curves if curve.seconds.size]
        mean_seconds: Array = np.mean(seconds, axis=0) if seconds else np.empty(0)
        return mean_seconds, mean, low, high
    known = [curve for curve in curves if curve.known(axis, metric)[0].size]
    if not known:
        return np.empty(0), np.empty(0), np.empty(0), np.empty(0)
    places = known[0].known(axis, metric)[0]
    if len(known) > 1:  # others may end a little before or begin a little after
        start = max(float(curve.known(axis, metric)[0][0]) for curve in known)
        end = min(float(curve.known(axis, metric)[0][-1]) for curve in known)
        places = np.unique(np.clip(places, start, end)) if start <= end else np.empty(0)
    values = np.array([curve.at(axis, places, metric) for curve in known])
    return places, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def uneven_seconds(groups: Mapping[str, Sequence[Curve]]) -> str:
    """What makes the seconds of runs of the same settings unfit to be compared; empty if nothing does."""
    worst = ("", 0.0)
    for name, curves in groups.items():
        paces = [float(curve.seconds[-1] / curve.iteration[-1]) for curve in curves if curve.seconds.size]
        paces = [pace for pace in paces if np.isfinite(pace) and pace > 0]
        if len(paces) > 1:
            worst = max(worst, (name, max(paces) / min(paces)), key=lambda found: found[1])
    if worst[1] <= UNEVEN:
        return ""
    return (
        f"Seconds do not compare here: of {worst[0]}, runs that differ by their seed alone took up to {worst[1]:.2f} "
        "times as long an iteration as others. Something else had the machine."
    )


def draw_band(axes: Axes, curves: Sequence[Curve], axis: Axis, metric: Metric, look: Look, label: str) -> None:
    """A line through the means and a band from the lowest to the highest; accuracies in percent."""
    places, mean, low, high = mean_and_range(curves, axis, metric)
    scale = 100.0 if metric == "test_top1" else 1.0
    every = max(1, places.size // 12)
    axes.plot(places, scale * mean, color=look.colour, marker=look.marker, markevery=every, label=label)
    if len(curves) > 1:
        axes.fill_between(places, scale * low, scale * high, color=look.colour, alpha=0.22, linewidth=0)


def finish_axes(axes: Axes, axis: Axis, metric: Metric) -> None:
    """Names of both axes; losses over more than a decade are shown logarithmically."""
    axes.set(xlabel=AXIS_NAMES[axis], ylabel=METRIC_NAMES[metric])
    values = np.concatenate(
        [np.empty(0), *(np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines())]
    )
    positive = values[np.isfinite(values) & (values > 0)]
    if metric != "test_top1" and positive.size and positive.max() > 10 * positive.min():
        log_axis(axes, "y")

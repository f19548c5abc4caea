"""Figure 5 of the paper: how much the Fisher's matrices change, as percentiles over the layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfac_dist.errors import InputError
from kfac_dist.plots.runs import RUN_COLOURS, STYLE, Array, put_legend_beside
from kfac_dist.runs.reader import read_metrics

PERCENTILES = (5, 25, 50, 75, 95)
MARKED_ITERATION = 500
_TITLES = {"A": "input factors A", "G": "output factors G", "F": "BatchNorm F"}


def diff_percentiles(records: Sequence[Mapping[str, Any]], matrix: str) -> tuple[Array, Array]:
    """Percentiles of Diff over the layers at each iteration that refreshed such matrices.

    Args:
        records: A run's `fisher` records.
        matrix: "A", "G" or "F".

    Returns:
        Iterations, (n,), and percentiles, (n, 5); empty where there are none.
    """
    diffs: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record["matrix"] == matrix and "diff" in record:
            diffs[record["iteration"]].append(float(record["diff"]))
    iterations = sorted(diffs)
    percentiles = [np.percentile(diffs[iteration], PERCENTILES) for iteration in iterations]
    return np.array(iterations, dtype=np.float64), np.array(percentiles, dtype=np.float64)


def draw_fisher_change(directory: str | Path) -> Figure:
    """A panel for each kind of matrix, Diff against the iteration; the 500th iteration is marked.

    Raises:
        InputError: If the run recorded no Diff.
    """
    records = [record for record in read_metrics(directory) if record.get("kind") == "fisher"]
    series = {matrix: diff_percentiles(records, matrix) for matrix in _TITLES}
    drawn = {matrix: values for matrix, values in series.items() if len(values[0])}
    if not drawn:
        raise InputError(f"{directory}: no Diff is recorded; train with kfac.monitor.diff=true")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for axes, (matrix, (iterations, percentiles)) in zip(panels, drawn.items(), strict=True):
            _draw_percentiles(axes, iterations, percentiles)
            axes.set_title(_TITLES[matrix], fontsize=9)
            axes.set_xlabel("iteration")
        panels[0].set_ylabel("Diff")
        panels[0].set_yscale("log")
        put_legend_beside(panels[-1], title="over layers")
    return figure


def _draw_percentiles(axes: Axes, iterations: Array, percentiles: Array) -> None:
    colour = RUN_COLOURS[0]
    axes.fill_between(iterations, percentiles[:, 0], percentiles[:, 4], color=colour, alpha=0.15, label="5–95 %", lw=0)
    axes.fill_between(iterations, percentiles[:, 1], percentiles[:, 3], color=colour, alpha=0.3, label="25–75 %", lw=0)
    axes.plot(iterations, percentiles[:, 2], color=colour, linewidth=1.4, label="median")
    if iterations[-1] >= MARKED_ITERATION:
        axes.axvline(MARKED_ITERATION, color="black", linewidth=1, linestyle=":")

"""Figure 2 of the paper as it is predicted: seconds an iteration against the number of GPUs, and the stages' shares."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfac_dist.planning.simulate import PLAN_STAGES, Prediction
from kfac_dist.plots.curves import STAGE_COLOURS
from kfac_dist.plots.runs import RUN_COLOURS, STYLE

_COLOURS = {**STAGE_COLOURS, "factors": "#8C564B"}


def draw_plan(points: Sequence[Prediction], title: str) -> Figure:
    """Seconds an iteration of K-FAC and SGD, and what share of K-FAC's each stage has."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.4), layout="constrained")
        figure.suptitle(title, fontsize=11, fontweight="bold")
        seconds, shares = figure.subplots(1, 2)
        _draw_seconds(seconds, points)
        _draw_shares(shares, points)
    return figure


def _draw_seconds(axes: Axes, points: Sequence[Prediction]) -> None:
    ranks = [point.num_ranks for point in points]
    lines = {"mean of the run": ([point.seconds for point in points], "-o", RUN_COLOURS[0])}
    if any(point.stale_seconds < point.refresh_seconds for point in points):
        lines["with a refresh"] = ([point.refresh_seconds for point in points], "--", RUN_COLOURS[1])
        lines["without"] = ([point.stale_seconds for point in points], ":", RUN_COLOURS[2])
    lines["SGD"] = ([point.sgd_seconds for point in points], "-.", RUN_COLOURS[6])
    for label, (values, form, colour) in lines.items():
        axes.plot(ranks, values, form, color=colour, markersize=3.5, linewidth=1.4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{number:,}" for number in ranks], rotation=45)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="GPUs", ylabel="seconds an iteration, predicted")
    axes.legend(fontsize=8)


def _draw_shares(axes: Axes, points: Sequence[Prediction]) -> None:
    places, bottom = np.arange(len(points)), np.zeros(len(points))
    for stage in PLAN_STAGES:
        heights = np.array([100 * point.stages[stage] / point.seconds for point in points])
        if heights.any():
            label = stage.replace("_", " ")
            axes.bar(places, heights, bottom=bottom, width=0.72, color=_COLOURS[stage], label=label)
            bottom += heights
    axes.set_xticks(places, [f"{point.num_ranks:,}" for point in points], rotation=45)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="GPUs", ylabel="share of the iteration (%)", ylim=(0, 100))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

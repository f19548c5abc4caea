"""Figures 3 and 6 of the paper: validation top-1 and learning rate against iteration and epoch."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfac_dist.plots.runs import (
    LINE_STYLES,
    RUN_COLOURS,
    STYLE,
    Run,
    column,
    put_legend_beside,
    read_config,
    start_epochs,
)


def batch_label(directory: str | Path) -> str | None:
    """A run's name in the legend: optimizer and batch size, where its configuration is there to read."""
    config = read_config(Path(directory))
    size = (config.get("batch") or {}).get("global_size")
    optimizer = {"kfac": "K-FAC", "sgd": "SGD"}.get((config.get("optimizer") or {}).get("name", ""), "")
    return f"{optimizer} batch {size:,}".strip() if isinstance(size, int) else None


def fisher_label(directory: str | Path) -> str | None:
    """A run's name in Figure 6: form of the BatchNorm Fisher and refresh schedule."""
    config = read_config(Path(directory))
    kfac = config.get("kfac") or {}
    refresh = kfac.get("refresh") or {}
    schedule = refresh.get("schedule")
    if schedule == "every":
        schedule = f"every {refresh['interval']}"
    return f"{kfac['batchnorm']}, {schedule}" if "batchnorm" in kfac and schedule else None


def draw_top1_and_learning_rate(runs: Sequence[Run]) -> Figure:
    """Two columns of the same curves: against the iteration, and against the epoch."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=[2, 1])
        for index, run in enumerate(runs):
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            line = LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)]
            rate_line = LINE_STYLES[index % len(LINE_STYLES)]
            for place, field in enumerate(("iteration", "epoch")):
                _draw_top1(axes[0, place], run, field, colour, line)
                _draw_learning_rate(axes[1, place], run, field, colour, rate_line)
        axes[0, 0].set_ylabel("validation top-1 (%)")
        axes[1, 0].set_ylabel("learning rate")
        axes[1, 0].set_xlabel("iteration")
        axes[1, 1].set_xlabel("epoch")
        for place in range(2):
            axes[1, place].set_xlim(left=0)
            axes[1, place].set_ylim(bottom=0)
        axes[1, 0].ticklabel_format(axis="y", style="plain")
        put_legend_beside(axes[0, 1], title="best top-1")
    return figure


def _draw_top1(axes: Axes, run: Run, field: str, colour: str, line: str) -> None:
    places, top1 = column(run.evaluations, field), column(run.evaluations, "top1")
    if field == "iteration":
        places = places + 1  # a record counts from 0; it was written when that iteration was done
    best = f": {top1.max():.1f} %" if top1.size else ""
    marker = "o" if top1.size < 30 else ""
    axes.plot(places, top1, line, color=colour, linewidth=1.4, marker=marker, markersize=3, label=f"{run.label}{best}")


def _draw_learning_rate(axes: Axes, run: Run, field: str, colour: str, line: str) -> None:
    places = start_epochs(run.train) if field == "epoch" else column(run.train, field)
    axes.plot(places, column(run.train, "learning_rate"), line, color=colour, linewidth=1.4)

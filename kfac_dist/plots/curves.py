"""Accuracy, learning rate, training loss and stage seconds of runs in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfac_dist.plots.runs import LINE_STYLES, RUN_COLOURS, STYLE, Array, Run, column, put_legend_beside, start_epochs
from kfac_dist.timing import STAGES

STAGE_COLOURS = {
    "data": "#BBBBBB",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "reduce_scatter": "#E69F00",
    "inverse": "#D55E00",
    "precondition": "#CC79A7",
    "all_gather": "#F0E442",
    "update": "#009E73",
}
_DARK_STAGES = ("backward", "inverse", "update")  # those that take white text
_LABELLED_SHARE = 0.045  # of the axis: a narrower part of a bar gets no number


def stage_seconds(train: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Typical seconds of each stage per iteration.

    The median over the iterations in which the stage took any time, times the share of such iterations. For
    a stage that always runs that is the plain median; one that runs every tenth iteration (a stale Fisher)
    counts with a tenth of its median, where a plain median would hide it.
    """
    typical = {}
    for stage in STAGES:
        seconds = np.array([float(record.get("stage_seconds", {}).get(stage, 0.0)) for record in train])
        ran = seconds[seconds > 0]
        typical[stage] = float(np.median(ran)) * ran.size / seconds.size if ran.size else 0.0
    return typical


def smooth(values: Array, window: int) -> Array:
    """Centred moving average of the same length, over fewer values towards the ends."""
    weights = np.ones(window)
    sums: Array = np.convolve(values, weights, mode="same")
    return sums / np.convolve(np.ones_like(values), weights, mode="same")


def draw_curves(runs: Sequence[Run], title: str) -> Figure:
    """Accuracy, learning rate and training loss against the epoch, and the seconds of the stages."""
    with matplotlib.rc_context(STYLE):
        bars_height = 0.75 + 0.32 * len(runs)
        figure = Figure(figsize=(8.6, 6.3 + bars_height), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[6.3, bars_height])
        curves, bars = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        curves.suptitle(title, fontsize=11, fontweight="bold")
        accuracy, rate, loss = curves.subplots(3, 1, sharex=True, height_ratios=[3, 0.9, 2.4])
        for index, run in enumerate(runs):
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            _draw_accuracy(accuracy, run, colour)
            _draw_learning_rate(rate, run, colour, LINE_STYLES[index % len(LINE_STYLES)])
            _draw_loss(loss, run, colour)
        accuracy.set_ylabel("test top-1 (%)")
        put_legend_beside(accuracy, title="last top-1")
        put_legend_beside(rate)
        rate.set(ylabel="learning rate\n(÷ its peak)", ylim=(0, 1.1), yticks=[0, 1])
        loss.set(ylabel="training loss\n(cross-entropy, nats)", xlabel="epoch")
        loss.set_xlim(left=0)
        loss.set_yscale(_loss_scale(runs))
        curves.align_ylabels()
        _draw_stages(bars.subplots(), runs)
    return figure


def _draw_accuracy(axes: Axes, run: Run, colour: str) -> None:
    epochs, top1 = column(run.evaluations, "epoch"), column(run.evaluations, "top1")
    last = f": {top1[-1]:.1f} %" if top1.size else ""
    axes.plot(epochs, top1, "-o", color=colour, markersize=3.5, linewidth=1.4, label=f"{run.label}{last}")


def _draw_learning_rate(axes: Axes, run: Run, colour: str, line: str) -> None:
    rates = column(run.train, "learning_rate")
    peak = np.nanmax(rates, initial=0.0)
    if peak > 0:
        label = f"peak {peak:.3g}"
        axes.plot(start_epochs(run.train), rates / peak, line, color=colour, linewidth=1.5, label=label)


def _draw_loss(axes: Axes, run: Run, colour: str) -> None:
    epochs = column(run.train, "epoch")
    axes.plot(epochs, column(run.train, "loss"), color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(epochs, _smoothed_losses(run), color=colour, linewidth=1.6)


def _smoothed_losses(run: Run) -> Array:
    losses = column(run.train, "loss")
    return smooth(losses, max(1, losses.size // 50))


def _loss_scale(runs: Sequence[Run]) -> str:
    """Logarithmic where the smoothed losses span more than a decade: else their ends all look like zero."""
    losses = np.concatenate([_smoothed_losses(run) for run in runs])
    positive = losses[np.isfinite(losses) & (losses > 0)]
    return "log" if positive.size and positive.max() > 10 * positive.min() else "linear"


def _draw_stages(axes: Axes, runs: Sequence[Run]) -> None:
    typical = [stage_seconds(run.train) for run in runs]
    longest = max(sum(seconds.values()) for seconds in typical) or 1.0
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1000.0)
    longest *= scale
    decimals = max(0, 2 - math.floor(math.log10(longest)))
    places = np.arange(len(runs))
    left = np.zeros(len(runs))
    for stage in STAGES:
        widths = scale * np.array([seconds[stage] for seconds in typical])
        if not widths.any():
            continue
        label = stage.replace("_", " ")
        bar = axes.barh(places, widths, left=left, color=STAGE_COLOURS[stage], height=0.62, label=label)
        texts = [f"{width:.{decimals}f}" if width > _LABELLED_SHARE * longest else "" for width in widths]
        colour = "white" if stage in _DARK_STAGES else "black"
        axes.bar_label(bar, texts, label_type="center", fontsize=7.5, color=colour)
        left += widths
    for place, total in zip(places, left, strict=True):
        axes.text(total + 0.01 * longest, float(place), f"{total:.{decimals}f} {unit}", va="center", fontsize=8)
    axes.set_yticks(places, [run.label for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * longest)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{'seconds' if unit == 's' else 'milliseconds'} per iteration (median)")
    if axes.containers:  # old runs have no stage seconds
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.46, 1.0),
            ncols=len(STAGES),
            fontsize=7.5,
            columnspacing=1.0,
            handlelength=1.0,
            handletextpad=0.4,
        )

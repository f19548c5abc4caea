"""Figure 2 of the paper: seconds an iteration against the number of ranks, of runs of one recipe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfac_dist.errors import InputError
from kfac_dist.plots.curves import STAGE_COLOURS, stage_seconds
from kfac_dist.plots.runs import RUN_COLOURS, STYLE, column, read_config, read_run
from kfac_dist.timing import STAGES

_LEFT_OUT = 0.2  # of the iterations, at the start: caches fill, cuDNN chooses, memory is allocated


@dataclass(frozen=True)
class ScalingPoint:
    """What a run says of the speed on its number of ranks.

    Attributes:
        num_ranks: How many there were.
        batch_size: The global batch.
        seconds: An iteration took: 25th percentile, median and 75th, the first fifth of them left out.
        stages: Seconds of each stage in an iteration.
    """

    num_ranks: int
    batch_size: int
    seconds: tuple[float, float, float]
    stages: dict[str, float]


def read_scaling_point(directory: str | Path) -> ScalingPoint:
    """Read a run's records, configuration and environment.

    Raises:
        InputError: If they are not there, or if the run is too short.
    """
    folder = Path(directory)
    train = read_run(folder).train
    steady = train[max(1, round(_LEFT_OUT * len(train))) :]
    if not steady:
        raise InputError(f"{folder}: must have two iterations or more, got {len(train)}")
    batch_size = (read_config(folder).get("batch") or {}).get("global_size")
    try:
        num_ranks = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["num_ranks"]
    except (OSError, ValueError, KeyError, TypeError):
        num_ranks = None
    if not isinstance(batch_size, int) or not isinstance(num_ranks, int):
        raise InputError(
            f"{folder}: config.yaml must tell the batch and environment.json the ranks; give a run's folder"
        )
    low, median, high = np.percentile(batch_size / column(steady, "images_per_second"), (25, 50, 75)).tolist()
    return ScalingPoint(num_ranks, batch_size, (low, median, high), stage_seconds(steady))


def draw_scaling(points: Sequence[ScalingPoint], title: str) -> Figure:
    """Seconds an iteration (median, and the middle half of them), and what its stages take of it."""
    points = sorted(points, key=lambda point: point.num_ranks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        figure.suptitle(title, fontsize=11, fontweight="bold")
        line, bars = figure.subplots(1, 2)
        _draw_line(line, points)
        _draw_bars(bars, points)
    return figure


def _draw_line(axes: Axes, points: Sequence[ScalingPoint]) -> None:
    ranks = [point.num_ranks for point in points]
    low, median, high = np.array([point.seconds for point in points]).T
    axes.errorbar(ranks, median, yerr=(median - low, high - median), fmt="-o", color=RUN_COLOURS[0], capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="ranks", ylabel="seconds an iteration")


def _draw_bars(axes: Axes, points: Sequence[ScalingPoint]) -> None:
    places = np.arange(len(points))
    bottom = np.zeros(len(points))
    for stage in STAGES:
        heights = np.array([point.stages[stage] for point in points])
        if heights.any():
            label = stage.replace("_", " ")
            axes.bar(places, heights, bottom=bottom, width=0.62, color=STAGE_COLOURS[stage], label=label)
            bottom += heights
    axes.set_xticks(places, [f"{point.num_ranks}\n{point.batch_size:,}" for point in points])
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks, global batch", ylabel="seconds of the stages")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

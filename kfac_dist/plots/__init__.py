"""Figures of runs, from their metrics.jsonl, and of the data they train on: `python -m kfac_dist.plots --help`."""

from kfac_dist.plots.batch import draw_batch
from kfac_dist.plots.command import main
from kfac_dist.plots.curves import draw_curves, smooth, stage_seconds
from kfac_dist.plots.figure3 import draw_figure3
from kfac_dist.plots.figure5 import diff_percentiles, draw_figure5
from kfac_dist.plots.runs import Run, column, describe_runs, read_run, save_figure

__all__ = [
    "Run",
    "column",
    "describe_runs",
    "diff_percentiles",
    "draw_batch",
    "draw_curves",
    "draw_figure3",
    "draw_figure5",
    "main",
    "read_run",
    "save_figure",
    "smooth",
    "stage_seconds",
]

"""Figures of runs, from their metrics.jsonl, and of the data they train on: `python -m kfac_dist.plots --help`."""

from kfac_dist.plots.accuracy import draw_top1_and_learning_rate
from kfac_dist.plots.batch import draw_batch
from kfac_dist.plots.command import main
from kfac_dist.plots.curves import draw_curves, smooth, stage_seconds
from kfac_dist.plots.fisher_change import diff_percentiles, draw_fisher_change
from kfac_dist.plots.fisher_memory import draw_fisher_memory
from kfac_dist.plots.runs import Run, column, describe_runs, read_run, save_figure
from kfac_dist.plots.scaling import ScalingPoint, draw_scaling, read_scaling_point

__all__ = [
    "Run",
    "ScalingPoint",
    "column",
    "describe_runs",
    "diff_percentiles",
    "draw_batch",
    "draw_curves",
    "draw_fisher_change",
    "draw_fisher_memory",
    "draw_scaling",
    "draw_top1_and_learning_rate",
    "main",
    "read_run",
    "read_scaling_point",
    "save_figure",
    "smooth",
    "stage_seconds",
]

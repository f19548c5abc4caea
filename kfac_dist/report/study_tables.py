"""The tables of a study's page, and the same trials as CSV."""

import csv
import io
import math
from collections.abc import Iterator

import numpy as np

from kfac_dist.report.best import best_of, fastest_to, time_to
from kfac_dist.report.curve import Axis
from kfac_dist.report.document import Table
from kfac_dist.report.results import Cell, Study, Trial
from kfac_dist.report.scaling import TOLERANCE, critical_batch, readable_target, scaling_of
from kfac_dist.report.sensitivity import WITHIN, correlation, final_grid, fixed_budget, good_points
from kfac_dist.report.words import NONE, decimal, duration, parameters, reached, spread


def cells(study: Study) -> Iterator[Cell]:
    """The cells that have results: by model, then batch size, then optimizer."""
    for model in study.models:
        for size in study.batch_sizes:
            for label in study.kinds:
                if study.seeds_of(Cell(model, size, label)):
                    yield Cell(model, size, label)


def best_table(study: Study) -> Table:
    """The best configurations by test accuracy and by training loss."""
    rows = []
    for cell in cells(study):
        by_test, by_loss = best_of(study, cell, "test_top1"), best_of(study, cell, "train_loss")
        rows.append(
            [
                cell.model,
                f"{cell.batch_size:,}",
                cell.optimizer,
                spread(by_test.spread("test_top1").scaled(100), 2) if by_test else NONE,
                parameters(by_test) if by_test else NONE,
                spread(by_loss.spread("train_loss"), 4) if by_loss else NONE,
                parameters(by_loss) if by_loss else NONE,
                decimal(by_test.chosen.epochs, 1) if by_test else NONE,
            ]
        )
    caption = (
        "Best final test accuracy and best final training loss, each with its configuration. With several seeds: mean "
        "(lowest … highest, number). A star marks the lowest or highest of three values or more: "
        "a better one may lie outside."
    )
    columns = ["model", "batch", "optimizer", "test %", "at", "train loss", "at", "epochs"]
    return Table(columns, rows, caption, num_labels=3)


def scaling_table(study: Study, model: str, target: str) -> Table:
    """Iterations to a target by batch size, with the excess over ideal scaling."""
    rows = []
    for label in study.kinds:
        scaling = scaling_of(study, model, label, target)
        found = dict(zip(scaling.batch_sizes, zip(scaling.iterations, scaling.excess(), strict=True), strict=True))
        texts = [_iterations(*found[size]) if size in found else NONE for size in study.batch_sizes]
        rows.append([label, *texts, str(critical_batch(scaling))])
    caption = (
        f"{model}, {readable_target(target)}: fewest iterations of the grid, and how many times the ideal that is. "
        f"Critical batch size: where iterations exceed the ideal by {100 * TOLERANCE:.0f} %."
    )
    if target.startswith("test_top1"):
        caption += " An accuracy is found at evaluations, so iterations may be too many by those between two of them."
    return Table(["optimizer", *(f"{size:,}" for size in study.batch_sizes), "critical batch"], rows, caption)


def _iterations(iterations: float, excess: float) -> str:
    return f"{iterations:,.0f} ({excess:.2f} ×)" if math.isfinite(iterations) else "not reached"


def time_table(study: Study, sgd: str) -> Table:
    """What each optimizer needs to reach the best SGD's final test accuracy."""
    rows = []
    for cell in cells(study):
        rival = best_of(study, Cell(cell.model, cell.batch_size, sgd))
        ours = best_of(study, cell)
        if rival is None or ours is None:
            continue
        level = rival.spread("test_top1").mean
        rows.append(
            [
                cell.model,
                f"{cell.batch_size:,}",
                cell.optimizer,
                f"{100 * level:.2f}",
                *reached(time_to(ours.trials, level), rival),
                *reached(fastest_to(study.grid(cell), level), rival),
            ]
        )
    caption = (
        f"Until the test accuracy is the final one of the best {sgd} (mean over its seeds), found at an evaluation: "
        "each optimizer's configuration with the best final accuracy (mean over the seeds that come there), and the "
        "one of its grid that needs the fewest epochs, with the grid's seed alone. In brackets: "
        f"how many times {sgd}'s whole runs that is, by the mean of their seconds."
    )
    columns = ["model", "batch", "optimizer", "level %", "epochs", "iterations", "seconds"]
    return Table([*columns, "fastest: epochs", "iterations", "seconds"], rows, caption, num_labels=3)


def sensitivity_table(study: Study) -> Table:
    """Shares of good configurations, and how damping or momentum and learning rate go together there."""
    axes: tuple[Axis, Axis] = ("epoch", "iteration")
    fixed = {
        (model, label, axis): fixed_budget(study, model, label, axis)
        for model in study.models
        for label in study.kinds
        for axis in axes
    }
    rows = []
    for cell in cells(study):
        final = final_grid(study.grid(cell))
        texts = []
        for axis in axes:
            grid = fixed[cell.model, cell.optimizer, axis].grids.get(cell.batch_size)
            texts.append(_share_text(math.nan if grid is None else grid.share()))
        x, y = good_points(final) if final.other == "damping" else (np.empty(0), np.empty(0))
        tilt = f"{correlation(x, y):+.2f} ({x.size})" if math.isfinite(correlation(x, y)) else NONE
        names = [cell.model, f"{cell.batch_size:,}", cell.optimizer]
        rows.append([*names, str(len(study.grid(cell))), _share_text(final.share()), *texts, tilt])
    caption = (
        f"Share of the grid, in %, with a test accuracy within {100 * WITHIN:.0f} % of the best of the same model, "
        "batch size and optimizer, at the end, after the same epochs and after the same iterations; correlation of the "
        "logarithms of learning rate and damping in that region at the end (number of configurations there)."
    )
    columns = ["model", "batch", "optimizer", "trials", "at the end", "same epochs", "same iterations", "correlation"]
    return Table(columns, rows, caption, num_labels=3)


def _share_text(share: float) -> str:
    return f"{100 * share:.0f}" if math.isfinite(share) else NONE


def cost_table(study: Study) -> Table:
    """What the best run and the whole search took."""
    rows = []
    for cell in cells(study):
        best, trials = best_of(study, cell), study.seeds_of(cell)
        an_iteration = best.chosen.seconds / max(1, best.chosen.iterations) if best else math.nan
        rows.append(
            [
                cell.model,
                f"{cell.batch_size:,}",
                cell.optimizer,
                duration(best.chosen.seconds) if best else NONE,
                f"{1000 * an_iteration:,.1f}" if math.isfinite(an_iteration) else NONE,
                str(len(trials)),
                str(sum(trial.status == "diverged" for trial in trials)),
                duration(_sum(trials, "seconds")),
                duration(_sum(trials, "cpu_seconds")),
            ]
        )
    caption = "Seconds are of training, without evaluations and start; processor time likewise, of all threads."
    columns = ["model", "batch", "optimizer", "best run", "ms an iteration", "trials", "diverged", "all trials"]
    return Table([*columns, "processor time"], rows, caption, num_labels=3)


def _sum(trials: list[Trial], name: str) -> float:
    values = [float(getattr(trial, name)) for trial in trials]
    return sum(value for value in values if math.isfinite(value))


def environment_table(study: Study) -> Table:
    """Which versions and machines the trials ran with."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for trial in study.trials:
        key = tuple((str(name), str(value)) for name, value in trial.environment.items())
        counts[key] = counts.get(key, 0) + 1
    rows = [[", ".join(f"{name} {value}" for name, value in key) or "not told", str(n)] for key, n in counts.items()]
    return Table(["environment", "trials"], rows)


def to_csv(study: Study) -> str:
    """One line for each trial that has a result: names, parameters, and all its values but the curve."""
    names = list(dict.fromkeys(name for trial in study.trials for name in trial.parameters))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    values = ["status", "epochs", "iterations", "seconds", "cpu_seconds", "train_loss", "test_top1", "best_test_top1"]
    targets = [f"iterations to {target}" for target in study.targets]
    writer.writerow(["index", "model", "batch_size", "optimizer", "seed", *names, *values, *targets])
    for trial in study.trials:
        numbers = [getattr(trial, name) for name in values]
        writer.writerow(
            [
                trial.index,
                *trial.cell,
                trial.seed,
                *(f"{trial.parameters[name]:.15g}" if name in trial.parameters else "" for name in names),
                *("" if isinstance(value, float) and math.isnan(value) else value for value in numbers),
                *(trial.iterations_to.get(target) or "" for target in study.targets),
            ]
        )
    return buffer.getvalue()

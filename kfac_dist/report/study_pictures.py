"""The figures of a study."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from kfac_dist.report.bands import AXIS_NAMES, METRIC_NAMES, draw_band, finish_axes
from kfac_dist.report.best import best_of
from kfac_dist.report.curve import Axis, Metric
from kfac_dist.report.document import Panel
from kfac_dist.report.pictures import INK, Look, batch_axis, draw, log_axis, plain
from kfac_dist.report.results import Cell, Study
from kfac_dist.report.scaling import readable_target, scaling_of, spread_to
from kfac_dist.report.sensitivity import Grid
from kfac_dist.vocabulary import FinalMetric

Looks = Mapping[str, Look]

_FINAL_NAMES = {"test_top1": "best test accuracy (%)", "train_loss": "best training loss (nats)"}
_MAP = colormaps["cividis"]


def draw_best(study: Study, model: str, final: FinalMetric, looks: Looks) -> Panel:
    """The best final value of each optimizer against the batch size, with the range over seeds."""

    def fill(axes: Axes) -> None:
        for label, look in looks.items():
            found = [(size, best_of(study, Cell(model, size, label), final)) for size in study.batch_sizes]
            points = [(size, best.spread(final)) for size, best in found if best is not None]
            scale = 100.0 if final == "test_top1" else 1.0
            mean = np.array([scale * spread.mean for _, spread in points])
            low = np.array([scale * spread.lowest for _, spread in points])
            high = np.array([scale * spread.highest for _, spread in points])
            if points:
                sizes = [size for size, _ in points]
                spread = np.abs(np.array([mean - low, high - mean]))  # rounding may make one of them -0.0…1
                axes.errorbar(sizes, mean, spread, color=look.colour, marker=look.marker, capsize=3, label=label)
        batch_axis(axes, study.batch_sizes)
        axes.set(ylabel=_FINAL_NAMES[final], title=model)
        low_y, high_y = axes.get_ylim()
        if final == "train_loss" and low_y > 0 and high_y > 10 * low_y:
            log_axis(axes, "y")

    return draw(f"best {final} {model}", f"{model}: {_FINAL_NAMES[final]} by batch size and optimizer", fill)


def draw_scaling(study: Study, model: str, target: str, looks: Looks) -> Panel:
    """Fewest iterations to a target against the batch size; dotted: ideal scaling of each optimizer."""

    def fill(axes: Axes) -> None:
        for label, look in looks.items():
            scaling = scaling_of(study, model, label, target)
            if scaling.anchor is None:
                continue
            sizes = scaling.batch_sizes
            for size, iterations in zip(sizes, scaling.iterations, strict=True):
                spread = spread_to(study, Cell(model, int(size), label), target)
                if spread is not None and math.isfinite(iterations):
                    axes.vlines(size, spread.lowest, spread.highest, color=look.colour, linewidth=3, alpha=0.4)
            reached = np.isfinite(scaling.iterations)
            points = sizes[reached], scaling.iterations[reached]
            axes.plot(*points, color=look.colour, marker=look.marker, label=label)
            axes.plot(sizes[scaling.anchor :], scaling.ideal()[scaling.anchor :], ":", color=look.colour, lw=1.2)
        batch_axis(axes, study.batch_sizes)
        log_axis(axes, "y")
        axes.set(ylabel="iterations", title=f"{model}: {readable_target(target)}")

    alt = f"{model}: iterations to {readable_target(target)} by batch size, with ideal scaling dotted"
    return draw(f"scaling {model} {target}", alt, fill)


def draw_curves(study: Study, model: str, size: int, axis: Axis, metric: Metric, looks: Looks) -> Panel:
    """A metric of each optimizer's best configuration at a batch size, over an axis, with a band over seeds."""

    def fill(axes: Axes) -> None:
        for label, look in looks.items():
            best = best_of(study, Cell(model, size, label), "train_loss" if metric == "train_loss" else "test_top1")
            if best is not None:
                draw_band(axes, [trial.curve for trial in best.trials], axis, metric, look, label)
        finish_axes(axes, axis, metric)
        axes.set_title(f"{model}, batch {size:,}")
        axes.set_xlim(left=0)

    against = f"{METRIC_NAMES[metric]} against {AXIS_NAMES[axis]}"
    alt = f"{model}, batch {size:,}: {against}, of the best configuration of each optimizer"
    return draw(f"curve {model} {size} {metric} {axis}", alt, fill)


def draw_shares(name: str, title: str, shares: Mapping[str, Mapping[int, float]], looks: Looks) -> Panel:
    """The share of good configurations against the batch size.

    Args:
        name: Of the panel.
        title: Of the picture.
        shares: Optimizer → batch size → share.
        looks: Optimizer → look.
    """

    def fill(axes: Axes) -> None:
        sizes = sorted({size for by_size in shares.values() for size in by_size})
        for label, by_size in shares.items():
            values = [100 * by_size[size] for size in sorted(by_size)]
            axes.plot(sorted(by_size), values, color=looks[label].colour, marker=looks[label].marker, label=label)
        if sizes:
            batch_axis(axes, sizes)
        axes.set(ylabel="good configurations (%)", title=title, ylim=(0, None))

    return draw(name, f"{title}: share of good configurations by batch size", fill)


def draw_heat_map(name: str, title: str, grid: Grid, highest: float) -> Panel:
    """Accuracies in percent over learning rate and the other parameter.

    Bold: within the good region; framed: the best; ×: diverged; empty: no result.

    Args:
        name: Of the panel.
        title: Of the picture.
        grid: What it shows.
        highest: The accuracy, a fraction, that has the lightest colour.
    """
    top1, best, good = grid.top1, grid.best, np.logical_or.reduce(grid.good())
    rows, columns = top1.shape
    # Where there is room: in whole numbers the best of a good region would look like others.
    digits = 1 if columns <= 5 else 0

    def fill(axes: Axes) -> None:
        axes.grid(visible=False)
        shown = np.ma.masked_where(~np.isfinite(top1) | (top1 == 0), top1)
        edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
        axes.pcolormesh(*edges, shown, cmap=_MAP, vmin=0, vmax=highest, edgecolors=INK, linewidth=0.3)
        for (row, column), value in np.ndenumerate(top1):
            if math.isfinite(value):
                light = value / highest > 0.55 if highest else True
                colour = INK if value == 0 else "black" if light else "white"
                text = "×" if value == 0 else f"{100 * value:.{digits}f}"
                weight = "bold" if good[row, column] else "normal"
                size = max(4.0, min(8.0, 62 / columns))
                cell = axes.text(column, row, text, ha="center", va="center", color=colour, weight=weight, size=size)
                cell.set_in_layout(False)  # else its size is measured again and again
                if value == best and best > 0:
                    axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, ec="#D55E00", lw=2))
        turned = 45 if columns > 5 else 0
        axes.set_xticks(range(columns), [plain(rate) for rate in grid.rates], rotation=turned)
        axes.set_yticks(range(rows), [plain(other) if grid.other else "" for other in grid.others])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="learning rate", ylabel=grid.other or "", title=title)

    alt = f"{title}: test accuracy over learning rate{f' and {grid.other}' if grid.other else ''}"
    return draw(name, alt, fill, height=1.15 + 0.27 * max(2, rows), legend=False)

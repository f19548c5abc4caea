"""The pictures of a run's card."""

import numpy as np
from matplotlib.axes import Axes

from kfac_dist.plots.curves import smooth, stage_seconds
from kfac_dist.plots.fisher_change import diff_percentiles
from kfac_dist.plots.runs import column
from kfac_dist.report.document import Panel
from kfac_dist.report.health import Records, Spectrum, relative_damping
from kfac_dist.report.pictures import INK, Look, draw, log_axis
from kfac_dist.report.runs import RunRecord
from kfac_dist.timing import STAGES

_OTHER = "#009E73"  # a second line beside the optimizer's
_MATRICES = {"A": "#0072B2", "G": "#D55E00", "F": "#009E73"}
_MATRIX_NAMES = {"A": "input A", "G": "output G", "F": "BatchNorm F"}
_STAGE_COLOUR = "#0072B2"


def draw_accuracy(run: RunRecord, look: Look) -> Panel:
    """Test accuracy against the epoch."""

    def fill(axes: Axes) -> None:
        places, values = run.curve.known("epoch", "test_top1")
        axes.plot(places, 100 * values, color=look.colour, marker=look.marker)
        axes.set(xlabel="epoch", ylabel="test top-1 (%)", title="test accuracy", xlim=(0, None))

    return draw("card accuracy", "test accuracy against the epoch", fill)


def draw_loss(run: RunRecord, look: Look) -> Panel:
    """Training loss, each iteration's and smoothed, and test loss, against the epoch."""

    def fill(axes: Axes) -> None:
        train = run.records["train"]
        epochs, losses = column(train, "epoch"), column(train, "loss")
        axes.plot(epochs, losses, color=look.colour, alpha=0.3, linewidth=0.8)
        axes.plot(epochs, smooth(losses, max(1, losses.size // 50)), color=look.colour, label="training")
        places, values = run.curve.known("epoch", "test_loss")
        axes.plot(places, values, color=_OTHER, marker="s", label="test")
        finite = np.concatenate([losses, values])
        finite = finite[np.isfinite(finite) & (finite > 0)]
        if finite.size and finite.max() > 10 * finite.min():
            log_axis(axes, "y")
        axes.set(xlabel="epoch", ylabel="loss (nats)", title="loss", xlim=(0, None))

    return draw("card loss", "training and test loss against the epoch", fill)


def draw_settings(run: RunRecord, look: Look) -> Panel:
    """Learning rate and damping against the iteration, each divided by its highest value."""

    def fill(axes: Axes) -> None:
        train = run.records["train"]
        colours = {"learning_rate": look.colour, "momentum": "#CC79A7", "damping": _OTHER}
        for (name, colour), line in zip(colours.items(), ("-", "--", ":"), strict=True):
            values = column(train, name)
            if np.isfinite(values).any() and np.nanmax(values) > 0:
                label = f"{name.replace('_', ' ')} ÷ {np.nanmax(values):.3g}"
                axes.plot(column(train, "iteration"), values / np.nanmax(values), line, color=colour, label=label)
        axes.set(xlabel="iteration", ylabel="share of the highest", title="schedules", ylim=(0, 1.08))

    return draw("card schedules", "learning rate, momentum and damping against the iteration", fill)


def draw_stages(run: RunRecord) -> Panel:
    """Seconds of each stage of an iteration."""
    seconds = {stage: value for stage, value in stage_seconds(run.records["train"]).items() if value > 0}
    unit, scale = ("ms", 1000.0) if sum(seconds.values()) < 1 else ("s", 1.0)

    def fill(axes: Axes) -> None:
        stages = [stage for stage in STAGES if stage in seconds]
        values = [scale * seconds[stage] for stage in stages]
        bars = axes.barh(range(len(stages)), values, color=_STAGE_COLOUR, height=0.65)
        total = sum(values) or 1.0
        axes.bar_label(
            bars, [f"{value:.3g} ({100 * value / total:.0f} %)" for value in values], fontsize=8, color=INK, padding=3
        )
        axes.set_yticks(range(len(stages)), [stage.replace("_", " ") for stage in stages])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=f"{unit} an iteration", title=f"stages, {total:.3g} {unit} together")
        axes.set_xlim(0, 1.35 * max(values, default=1.0))

    return draw("card stages", "seconds of each stage of an iteration", fill, height=1.1 + 0.25 * len(seconds))


def draw_throughput(run: RunRecord, look: Look) -> Panel:
    """Images a second against the iteration."""

    def fill(axes: Axes) -> None:
        train = run.records["train"]
        values = column(train, "images_per_second")
        axes.plot(column(train, "iteration"), values, color=look.colour, alpha=0.3, linewidth=0.8)
        axes.plot(column(train, "iteration"), smooth(values, max(1, values.size // 50)), color=look.colour)
        axes.set(xlabel="iteration", ylabel="images per second", title="throughput", ylim=(0, None))

    return draw("card throughput", "images per second against the iteration", fill)


def draw_eigenvalues(found: dict[str, Spectrum]) -> Panel:
    """Largest eigenvalue over all layers, and the median of the layers' largest, for each kind of matrix."""

    def fill(axes: Axes) -> None:
        for matrix, spectrum in found.items():
            colour = _MATRICES.get(matrix, INK)
            name = _MATRIX_NAMES.get(matrix, matrix)
            axes.plot(spectrum.iterations, spectrum.largest, color=colour, marker="o", label=f"{name}, largest")
            axes.plot(spectrum.iterations, spectrum.median_largest, "--", color=colour, label=f"{name}, median")
        log_axis(axes, "y")
        axes.set(xlabel="iteration", ylabel="eigenvalue", title="largest eigenvalue of the layers' matrices")

    return draw("card eigenvalues", "largest eigenvalues of the factors against the iteration", fill, height=3.4)


def draw_ranks(found: dict[str, Spectrum]) -> Panel:
    """Median effective rank over the layers, for each kind of matrix."""

    def fill(axes: Axes) -> None:
        for matrix, spectrum in found.items():
            name = _MATRIX_NAMES.get(matrix, matrix)
            axes.plot(spectrum.iterations, spectrum.rank, color=_MATRICES.get(matrix, INK), marker="o", label=name)
        axes.set(xlabel="iteration", ylabel="effective rank", title="median effective rank", ylim=(0, None))

    return draw("card ranks", "median effective rank of the factors against the iteration", fill)


def draw_relative_damping(train: Records, fisher: Records, look: Look) -> Panel:
    """Damping divided by the largest eigenvalue of the layers' Fisher blocks."""

    def fill(axes: Axes) -> None:
        places, ratios = relative_damping(train, fisher)
        axes.plot(places, ratios, color=look.colour, marker=look.marker)
        axes.axhline(1, color=INK, linewidth=1, linestyle=":")
        log_axis(axes, "y")
        axes.set(xlabel="iteration", ylabel="γ ÷ (λmax(A) λmax(G))", title="damping beside the curvature (median)")

    return draw("card damping", "damping divided by the largest curvature against the iteration", fill)


def draw_change(fisher: Records) -> Panel:
    """Diff (Eq. 19) against the iteration: median over layers, and its 5th to 95th percentile."""

    def fill(axes: Axes) -> None:
        for matrix, colour in _MATRICES.items():
            iterations, percentiles = diff_percentiles(fisher, matrix)
            if iterations.size:
                low, median, high = percentiles[:, 0], percentiles[:, 2], percentiles[:, 4]
                axes.fill_between(iterations, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(iterations, median, color=colour, label=_MATRIX_NAMES[matrix], linewidth=1.2)
        axes.set(xlabel="iteration", ylabel="Diff", title="change from refresh to refresh")
        log_axis(axes, "y")

    return draw("card change", "relative change of the factors from refresh to refresh", fill)

"""Groups of runs side by side: by epoch, by iteration and by the clock."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.axes import Axes

from kfac_dist.report.bands import AXIS_NAMES, METRIC_NAMES, draw_band, finish_axes, mean_and_range
from kfac_dist.report.best import Spread
from kfac_dist.report.curve import Axis, Curve, Metric, uneven_pace
from kfac_dist.report.document import Block, Figure, Page, Panel, Paragraph, Section, Table
from kfac_dist.report.findings import half_interval
from kfac_dist.report.groups import Group
from kfac_dist.report.pictures import Look, draw, looks_of
from kfac_dist.report.render import check_output, write_page
from kfac_dist.report.words import NONE, UNEVEN, decimal, spread

_AXES: tuple[Axis, ...] = ("epoch", "iteration", "seconds")
_MOST_ROWS = 12
_SHARED = ("data.name", "model.name", "batch.global_size", "train.epochs")
"""What a page names of the settings that all groups have alike."""


def report_pair(groups: Sequence[Group], output: str | Path) -> list[Path]:
    """Write a comparison as HTML and Markdown; the last group is the baseline.

    Raises:
        InputError: If the output cannot be written.
    """
    output = check_output(output)
    return write_page(pair_page(groups), output)


def pair_page(groups: Sequence[Group]) -> Page:
    """All that the groups tell of each other."""
    looks = looks_of({group.label: group.kind for group in groups})
    baseline = groups[-1]
    labels = ", ".join(group.label for group in groups[:-1])
    sections = [
        Section("Accuracy", [Figure(_panels(groups, "test_top1", looks), _caption(groups)), _final_table(groups)]),
        Section(f"To the final accuracy of {baseline.label}", [_time_table(groups)]),
        Section("Training loss", [Figure(_panels(groups, "train_loss", looks), _caption(groups))]),
        Section("Epoch by epoch", [_epoch_table(groups)]),
        Section("Settings", list(_settings(groups))),
    ]
    return Page(f"{labels} against {baseline.label}", _lead(groups), list(notices(groups)), sections)


def _lead(groups: Sequence[Group]) -> str:
    parts = [f"{g.label}: {len(g.curves)} run{'s' if len(g.curves) > 1 else ''}" for g in groups]
    known = {key: {group.settings.get(key) for group in groups} for key in _SHARED}
    shared = [f"{key} {value}" for key, (value, *others) in known.items() if value is not None and not others]
    alike = f" All with {', '.join(shared)}." if shared else ""
    return "; ".join(parts) + "." + alike


def notices(groups: Sequence[Group]) -> Iterator[Paragraph]:
    """What a reader should know before comparing."""
    if any(len(group.curves) < 2 for group in groups):
        yield Paragraph("A group of one run has no interval: nothing tells its result from chance.", is_notice=True)
    for group in groups:
        yield from (Paragraph(f"{group.label}: {text}", is_notice=True) for text in _doubts(group))
    tunings = {group.tuning for group in groups}
    if len(tunings) > 1:
        text = "; ".join(f"{g.label}: {g.tuning or 'not known'}" for g in groups)
        yield Paragraph(f"The groups were not tuned alike: {text}.", is_notice=True)


def _doubts(group: Group) -> Iterator[str]:
    """What keeps a group from being finished runs that differ by their seed and had the machine alike."""
    if group.unfinished:
        yield f"not finished: {', '.join(group.unfinished)}. The last evaluation so far is taken for the end."
    if group.differing:
        yield f"its runs differ not only by their seed, but in {', '.join(group.differing)}."
    elif (pace := uneven_pace(group.curves)) is not None:
        yield f"its runs took {pace[0]:.3g} to {pace[1]:.3g} s an iteration. {UNEVEN}"


def _caption(groups: Sequence[Group]) -> str:
    several = any(len(group.curves) > 1 for group in groups)
    band = " Lines are means over seeds, bands go from the lowest to the highest." if several else ""
    return f"Seconds are of training, without evaluations.{band}"


def _panels(groups: Sequence[Group], metric: Metric, looks: Mapping[str, Look]) -> list[Panel]:
    return [_panel(groups, axis, metric, looks) for axis in _AXES]


def _panel(groups: Sequence[Group], axis: Axis, metric: Metric, looks: Mapping[str, Look]) -> Panel:
    def fill(axes: Axes) -> None:
        for group in groups:
            draw_band(axes, group.curves, axis, metric, looks[group.label], group.label)
        finish_axes(axes, axis, metric)
        axes.set_xlim(left=0)

    alt = f"{METRIC_NAMES[metric]} against {AXIS_NAMES[axis]} of {', '.join(group.label for group in groups)}"
    return draw(f"pair {metric} {axis}", alt, fill)


def last(curve: Curve, metric: Metric) -> float:
    """The last value that was measured; not a number without any."""
    values = curve.known("iteration", metric)[1]
    return float(values[-1]) if values.size else math.nan


def paired_difference(ours: Group, baseline: Group) -> tuple[float, float, int]:
    """Mean difference of the final accuracies, half its 95 % interval, and how many seeds it is paired by.

    Where both groups ran the same seeds, once each and at least two, differences are taken seed by seed; else it is
    the difference of the means with Welch's interval, and 0 seeds are paired.
    """
    first = dict(zip(ours.seeds, (last(curve, "test_top1") for curve in ours.curves), strict=True))
    second = dict(zip(baseline.seeds, (last(curve, "test_top1") for curve in baseline.curves), strict=True))
    if len(first) == len(ours.curves) and len(second) == len(baseline.curves) and first.keys() == second.keys():
        differences = np.array([first[seed] - second[seed] for seed in first])
        if len(differences) > 1:
            error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
            half = float(scipy.stats.t.ppf(0.975, len(differences) - 1)) * error
            return float(differences.mean()), half, len(differences)
    a, b = ([last(curve, "test_top1") for curve in group.curves] for group in (ours, baseline))
    return float(np.mean(a) - np.mean(b)), half_interval(a, b), 0


def _final_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        accuracy = Spread(tuple(100 * last(curve, "test_top1") for curve in group.curves))
        loss = Spread(tuple(last(curve, "train_loss") for curve in group.curves))
        seconds = Spread(tuple(float(curve.seconds[-1]) for curve in group.curves))
        difference = NONE
        if group is not groups[-1]:
            mean, half, num_paired = paired_difference(group, groups[-1])
            difference = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if math.isfinite(half) else "")
            difference += f" (paired, n = {num_paired})" if num_paired else ""
        rows.append([group.label, spread(accuracy, 2), difference, spread(loss, 4), spread(seconds, 1)])
    caption = (
        f"At the end: test accuracy in %, its difference to {groups[-1].label} in points with 95 % interval, training "
        "loss and seconds of training; each is the mean over seeds (lowest … highest)."
    )
    return Table(["group", "test %", "difference", "train loss", "seconds"], rows, caption)


def _time_table(groups: Sequence[Group]) -> Table:
    level = float(np.mean([last(curve, "test_top1") for curve in groups[-1].curves]))
    rows = []
    for group in groups:
        row = [group.label]
        for axis in _AXES:
            ours, budget = mean_time(group.curves, axis, level), _length(groups[-1], axis)
            row.append(f"{decimal(ours, 1)} ({ours / budget:.2f} ×)" if math.isfinite(ours) else "not reached")
        rows.append(row)
    caption = (
        f"The first evaluation at which the mean accuracy over seeds is at least {100 * level:.2f} %, and in brackets "
        f"how many times the whole length of {groups[-1].label}'s runs that is."
    )
    return Table(["group", "epochs", "iterations", "seconds"], rows, caption)


def mean_time(curves: Sequence[Curve], axis: Axis, level: float) -> float:
    """Where the mean test accuracy over runs first is at least the level; not a number if it never is."""
    places, mean, _, _ = mean_and_range(curves, axis, "test_top1")
    good = mean >= level - 1e-12  # a mean of equal values may be rounded
    return float(places[np.argmax(good)]) if good.any() else math.nan


def _length(group: Group, axis: Axis) -> float:
    return float(np.mean([curve.along(axis)[-1] for curve in group.curves]))


def _epoch_table(groups: Sequence[Group]) -> Table:
    ends = [mean_and_range(group.curves, "epoch", "test_top1")[0] for group in groups]
    longest = max(ends, key=len)
    rounds = np.unique(np.linspace(0, len(longest) - 1, min(_MOST_ROWS, len(longest))).round().astype(int))
    rows = []
    for epoch in longest[rounds]:
        row = [f"{epoch:.1f}"]
        for group in groups:
            values = [float(curve.at("epoch", epoch, "test_top1")) for curve in group.curves]
            row.append(spread(Spread(tuple(100 * value for value in values)), 1))
        rows.append(row)
    return Table(["epoch", *(group.label for group in groups)], rows, "Test accuracy in %, between evaluations linear.")


def _settings(groups: Sequence[Group]) -> Iterator[Block]:
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    differing = [key for key in keys if len({group.settings.get(key) for group in groups}) > 1]
    rows = [[key, *(group.settings.get(key, NONE) for group in groups)] for key in differing]
    rows += [["seeds", *(", ".join(map(str, group.seeds)) for group in groups)]]
    rows += [["tuning", *(group.tuning or "not known" for group in groups)]]
    columns = ["key", *(group.label for group in groups)]
    yield Table(columns, rows, "Settings in which the groups differ.", num_labels=len(columns))

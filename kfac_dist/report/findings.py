"""The five findings of the AAAI 2020 poster, each confirmed, contradicted or undecided by a study's data.

Four of them are decided by votes: each comparison that the data allow (a model and batch size, a model and target, …)
speaks for the finding, against it, or for neither. At least `MAJORITY` of all votes must agree; otherwise, and without
a vote, a finding is undecided. The fifth is decided by an interval. Only batch sizes whose planned trials have all
finished, and none failed, take part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.stats

from kfac_dist.report.best import Best, best_of
from kfac_dist.report.curve import Axis
from kfac_dist.report.results import Cell, Study
from kfac_dist.report.scaling import TOLERANCE, Scaling, readable_target, scaling_of
from kfac_dist.report.sensitivity import WITHIN, final_grid, fixed_budget, good_points, pooled_correlation, trend

Verdict = Literal["confirmed", "contradicted", "undecided"]

MAJORITY = 0.75
MARGIN = 0.01
"""Accuracies that differ by no more than this, a fraction, are comparable."""
WORSE = 1.1
"""One optimizer scales worse if its excess is so many times the other's."""
MIN_TREND = 0.5
MIN_CHANGE = 0.05
MIN_SIZES = 3

_RULE = f"decided if at least {100 * MAJORITY:.0f} % of the comparisons agree"


@dataclass(frozen=True)
class Vote:
    """One comparison.

    Attributes:
        where: What was compared.
        number: What came out, in words.
        says: 1 for the finding, −1 against it, 0 neither.
        value: The number that was judged.
    """

    where: str
    number: str
    says: int
    value: float


@dataclass(frozen=True)
class Finding:
    """A finding and what the data say of it.

    Attributes:
        claim: What the poster found.
        verdict: Of the data.
        number: What decides, or why nothing does.
        rule: How it is decided.
        votes: All comparisons.
    """

    claim: str
    verdict: Verdict
    number: str
    rule: str
    votes: tuple[Vote, ...]


def judge(study: Study) -> list[Finding]:
    """The poster's findings, in its order, for the study's first optimizers named kfac and sgd."""
    kfac, sgd = study.first_of_kind("kfac"), study.first_of_kind("sgd")
    return [
        _performance(study, kfac, sgd),
        _speedup(study, kfac, sgd),
        _region(study, kfac, "epoch", -1),
        _region(study, kfac, "iteration", 1),
        _tilt(study, kfac),
    ]


def count(votes: Sequence[Vote], summary: str) -> tuple[Verdict, str]:
    """The verdict of votes, and what decides it in words.

    Args:
        votes: All comparisons.
        summary: A sentence about their values.
    """
    if not votes:
        return "undecided", "No comparison is possible with these results: see the rule for what it takes."
    ayes, noes = (sum(vote.says == side for vote in votes) for side in (1, -1))
    text = f"{summary} {ayes} of {len(votes)} comparisons for it, {noes} against it."
    if ayes >= MAJORITY * len(votes):
        return "confirmed", text
    return ("contradicted" if noes >= MAJORITY * len(votes) else "undecided"), text


def _median(votes: Sequence[Vote]) -> float:
    return float(np.median([vote.value for vote in votes])) if votes else math.nan


def _complete_sizes(study: Study, model: str, *optimizers: str) -> list[int]:
    return [
        size
        for size in study.batch_sizes
        if all(
            study.grid(Cell(model, size, label)) and study.is_complete(Cell(model, size, label)) for label in optimizers
        )
    ]


def _performance(study: Study, kfac: str | None, sgd: str | None) -> Finding:
    votes = []
    if kfac is not None and sgd is not None:
        for model in study.models:
            for size in _complete_sizes(study, model, kfac, sgd):
                ours, theirs = best_of(study, Cell(model, size, kfac)), best_of(study, Cell(model, size, sgd))
                if ours is not None and theirs is not None:
                    votes.append(_compare(f"{model}, batch {size:,}", ours, theirs))
    verdict, number = count(votes, f"Median of K-FAC − SGD: {_median(votes):+.2f} points.")
    rule = (
        f"Best final test accuracy of the grids at each batch size: comparable if they differ by at most "
        f"{100 * MARGIN:g} point. A larger difference speaks against, unless it is inside its 95 % interval over the "
        f"seeds (Welch; where both have several). {_RULE.capitalize()}."
    )
    claim = "K-FAC's test accuracy is comparable to SGD's, not superior, both tuned at each batch size."
    return Finding(claim, verdict, number, rule, tuple(votes))


def _compare(where: str, ours: Best, theirs: Best) -> Vote:
    a, b = ours.spread("test_top1"), theirs.spread("test_top1")
    difference = a.mean - b.mean
    half = half_interval(a.values, b.values)
    margin = MARGIN + 1e-9  # 0.71 − 0.70 is a little more than 0.01
    limit = max(margin, half) if math.isfinite(half) else margin
    text = f"{100 * a.mean:.2f} − {100 * b.mean:.2f} = {100 * difference:+.2f} points"
    if math.isfinite(half):
        text += f" ± {100 * half:.2f}"
    if abs(difference) <= margin:
        return Vote(where, f"{text}: comparable", 1, 100 * difference)
    if abs(difference) <= limit:
        return Vote(where, f"{text}: inside its interval", 0, 100 * difference)
    return Vote(where, f"{text}: {'superior' if difference > 0 else 'inferior'}", -1, 100 * difference)


def half_interval(a: Sequence[float], b: Sequence[float]) -> float:
    """Half the 95 % interval of the difference of two means (Welch); not a number unless both have two values."""
    if len(a) < 2 or len(b) < 2:
        return math.nan
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True) if part > 0
    )
    return float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(total)


def _speedup(study: Study, kfac: str | None, sgd: str | None) -> Finding:
    votes = []
    if kfac is not None and sgd is not None:
        losses = [name for name in study.targets if name.startswith("train_loss")]
        for model in study.models:
            sizes = _complete_sizes(study, model, kfac, sgd)
            for target in losses or study.targets:
                vote = _compare_scaling(
                    f"{model}, {readable_target(target)}",
                    _only(scaling_of(study, model, kfac, target), sizes),
                    _only(scaling_of(study, model, sgd, target), sizes),
                )
                votes += [vote] if vote is not None else []
    verdict, number = count(votes, _summary(votes))
    rule = (
        "Fewest iterations of the grid to each training-loss target, divided by ideal scaling from the smallest batch "
        "size that both optimizers reach it with: this excess, at the largest batch size that either reaches it with. "
        f"For the finding if both exceed {1 + TOLERANCE:g} and K-FAC's is more than {WORSE:g} times SGD's; against it "
        f"if one stays within {1 + TOLERANCE:g}, or SGD's is more than {WORSE:g} times K-FAC's. Of one that does not "
        f"reach it, its longest run tells what its excess is above. At least {MIN_SIZES} batch sizes. "
        f"{_RULE.capitalize()}. (Zhang et al., NeurIPS 2019, found the opposite: K-FAC scales further.)"
    )
    claim = "Both have diminishing returns with the batch size, and K-FAC's are worse."
    return Finding(claim, verdict, number, rule, tuple(votes))


def _only(scaling: Scaling, sizes: Sequence[int]) -> Scaling:
    kept = np.isin(scaling.batch_sizes, sizes)
    return Scaling(scaling.batch_sizes[kept], scaling.iterations[kept], scaling.searched[kept])


def _compare_scaling(where: str, kfac: Scaling, sgd: Scaling) -> Vote | None:
    both = np.flatnonzero(np.isfinite(kfac.iterations) & np.isfinite(sgd.iterations))
    either = np.flatnonzero(np.isfinite(kfac.iterations) | np.isfinite(sgd.iterations))
    if not both.size or either[-1] - both[0] < MIN_SIZES - 1:
        return None
    first, last = int(both[0]), int(either[-1])
    ours, theirs = float(kfac.excess(first)[last]), float(sgd.excess(first)[last])
    # Of one that does not reach the target only this is known: its excess is above that of its longest run.
    ours_least, theirs_least = float(kfac.least_excess(first)[last]), float(sgd.least_excess(first)[last])
    span = f"batch {kfac.batch_sizes[first]:,.0f} → {kfac.batch_sizes[last]:,.0f}"
    text = f"{span}: K-FAC {_times(ours, ours_least)}, SGD {_times(theirs, theirs_least)}"
    if min(ours_least, theirs_least) > 1 + TOLERANCE and ours_least > WORSE * theirs:
        return Vote(where, text, 1, ours / theirs)
    against = min(ours, theirs) <= 1 + TOLERANCE or theirs_least > WORSE * ours
    return Vote(where, text, -1 if against else 0, ours / theirs)


def _summary(votes: Sequence[Vote]) -> str:
    """Of K-FAC's excess divided by SGD's, which is infinite or 0 where one does not reach the target."""
    ratios = [vote.value for vote in votes if 0 < vote.value < math.inf]
    parts = [f"Median of K-FAC's excess ÷ SGD's: {np.median(ratios):.2f}."] if ratios else []
    for name, value in (("K-FAC", math.inf), ("SGD", 0.0)):
        if number := sum(vote.value == value for vote in votes):
            where = "" if number == len(votes) else f" in {number} of {len(votes)} comparisons"
            parts.append(f"{name} does not reach the target at the largest batch size{where}.")
    return " ".join(parts)


def _times(excess: float, least: float) -> str:
    return f"{excess:.2f} × ideal" if math.isfinite(excess) else f"does not reach it within {least:.2f} × ideal"


def _region(study: Study, kfac: str | None, axis: Axis, direction: int) -> Finding:
    votes = []
    for model in study.models if kfac is not None else []:
        assert kfac is not None
        sizes = _complete_sizes(study, model, kfac)
        fixed = fixed_budget(study, model, kfac, axis)
        grids = {size: grid for size, grid in fixed.grids.items() if size in sizes}
        if len(grids) < MIN_SIZES:
            continue
        common = max(grid.best for grid in grids.values())
        for name, best in (("the best of its batch size", None), ("the best of all batch sizes", common)):
            shares = [grid.share(best) for grid in grids.values()]
            where = f"{model}, after {fixed.place:.4g} {axis}s, within {100 * WITHIN:.0f} % of {name}"
            votes.append(_vote_on_trend(where, list(grids), shares, direction))
    verdict, number = count(votes, f"Median change of the share: {_median(votes):+.0f} points of the grid.")
    how = "shrink" if direction < 0 else "widen"
    rule = (
        f"Share of K-FAC's grid with a test accuracy within {100 * WITHIN:.0f} % of the best, after the same "
        f"number of {axis}s (read from the runs' curves). For the finding if Kendall's tau of share and batch "
        f"size is at least {MIN_TREND:g} in its direction and the share changes by at least {100 * MIN_CHANGE:g} "
        f"points from the smallest to the largest; against it if that holds the other way round. At least {MIN_SIZES} "
        f"batch sizes. {_RULE.capitalize()}."
    )
    claim = f"For fixed {axis}s, larger batches {how} the region of good hyper-parameters."
    return Finding(claim, verdict, number, rule, tuple(votes))


def _vote_on_trend(where: str, sizes: Sequence[int], shares: Sequence[float], direction: int) -> Vote:
    tau, change = trend(shares), shares[-1] - shares[0]
    text = (
        f"{100 * shares[0]:.0f} % at batch {sizes[0]:,} → {100 * shares[-1]:.0f} % at batch {sizes[-1]:,}, "
        f"tau {tau:+.2f}"
    )
    clear = abs(tau) >= MIN_TREND and abs(change) >= MIN_CHANGE and tau * change > 0
    return Vote(where, text, int(np.sign(change)) * direction if clear else 0, 100 * change)


def _tilt(study: Study, kfac: str | None) -> Finding:
    rule = (
        f"Correlation of log damping and log learning rate over the configurations within {100 * WITHIN:.0f} % of "
        "the best final test accuracy of their model and batch size, pooled within these groups: confirmed if its "
        "95 % interval (Fisher's z, one degree of freedom a group) lies above 0, contradicted if below."
    )
    claim = "Good damping and good learning rates are positively correlated."
    votes, groups = [], []
    for model in study.models if kfac is not None else []:
        assert kfac is not None
        for size in _complete_sizes(study, model, kfac):
            grid = final_grid(study.grid(Cell(model, size, kfac)))
            if grid.other != "damping":
                continue
            group = good_points(grid)
            groups.append(group)
            r = pooled_correlation([group])[0]
            votes.append(Vote(f"{model}, batch {size:,}", _correlation_text(r, group[0].size), _sign(r), r))
    r, low, high = pooled_correlation(groups)
    if not math.isfinite(low):
        return Finding(claim, "undecided", "Too few good configurations with different values.", rule, tuple(votes))
    verdict: Verdict = "confirmed" if low > 0 else "contradicted" if high < 0 else "undecided"
    number = f"r = {r:+.2f}, 95 % interval {low:+.2f} … {high:+.2f}."
    return Finding(claim, verdict, number, rule, tuple(votes))


def _correlation_text(r: float, points: int) -> str:
    return f"r = {r:+.2f}, {points} good configurations" if math.isfinite(r) else f"{points} good configurations"


def _sign(value: float) -> int:
    return int(np.sign(value)) if math.isfinite(value) else 0

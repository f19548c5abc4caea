"""How often the iterations of a run do what: its refresh schedule, walked through."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.create import refresh_costs
from kfac_dist.curvature.refresh_schedule import IntervalRefresh, RefreshSchedule
from kfac_dist.planning.work import Refresh


def refresh_shares(schedule: RefreshSchedule, blocks: Sequence[Block], num_iterations: int) -> dict[Refresh, float]:
    """Share of a run's iterations by what they refresh and solve with; the shares add up to 1.

    With an adaptive schedule every Diff is taken to stay below the threshold, so that the intervals grow as fast as
    they can; what it refreshes is then counted as so many iterations, by work, in which all is refreshed.

    Args:
        schedule: A new one; it is walked through.
        blocks: Of the model.
        num_iterations: Of the run.
    """
    costs = refresh_costs(blocks)
    schedule.plan_for(costs)
    if isinstance(schedule, IntervalRefresh):  # which looks at the matrix's name alone
        return _by_kind(schedule, sorted({(matrix, matrix) for _, matrix in costs}), num_iterations)
    return _by_work(schedule, costs, num_iterations)


def _by_kind(schedule: IntervalRefresh, kinds: Sequence[FactorKey], num_iterations: int) -> dict[Refresh, float]:
    served: dict[str, int] = {}
    counts: Counter[Refresh] = Counter()
    for iteration in range(num_iterations):
        due = schedule.due(kinds, iteration)
        for key in due:
            served[key[1]] = schedule.expected_interval(key, iteration)
        schedule.record(iteration, dict.fromkeys(due, 0.0))
        counts[Refresh.of((matrix for _, matrix in due), served)] += 1
    return {refresh: count / num_iterations for refresh, count in counts.items()}


def _by_work(schedule: RefreshSchedule, costs: Mapping[FactorKey, float], num_iterations: int) -> dict[Refresh, float]:
    keys, total = list(costs), sum(costs.values()) * num_iterations
    kinds = frozenset(matrix for _, matrix in keys)
    refreshed = 0.0
    for iteration in range(num_iterations):
        due = schedule.due(keys, iteration)
        schedule.record(iteration, dict.fromkeys(due, 0.0))
        refreshed += sum(costs[key] for key in due)
    if not total:
        return {Refresh.of((), {}): 1.0}
    share = round(refreshed / total, 9)  # sums of floats
    served = dict.fromkeys(kinds, round(1 / share))
    shares = {Refresh.of(kinds, served): share, Refresh.of((), served): 1.0 - share}
    return {refresh: value for refresh, value in shares.items() if value > 0}

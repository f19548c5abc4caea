"""Refresh schedules against tables, and what the optimizer makes of them. One process."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from kfac_dist import KFAC
from kfac_dist.curvature.blocks.base import FactorKey
from kfac_dist.curvature.refresh_schedule import AdaptiveRefresh, IntervalRefresh, eq20_interval, eq21_interval
from kfac_dist.curvature.running import relative_change
from tests.small_net import assert_equal, backward, make_kfac, make_net, train, weights

KEYS: list[FactorKey] = [("conv", "A"), ("conv", "G"), ("bn", "F")]


def refreshed_at(schedule: Any, key: FactorKey, iterations: int, change: Any = lambda iteration: 0.0) -> list[int]:
    """Iterations in which the schedule refreshes a key, when every refresh reports `change(iteration)`."""
    found = []
    for iteration in range(iterations):
        due = schedule.due(KEYS, iteration)
        schedule.record(iteration, {each: change(iteration) for each in due})
        if key in due:
            found.append(iteration)
    return found


# The paper's rules


@pytest.mark.parametrize(
    ("epoch", "eq20", "eq21"),
    [(0, 1, 1), (4.99, 1, 1), (5, 6, 1), (9.5, 6, 1), (10, 11, 1), (12.99, 11, 1), (13, 11, 20), (15, 16, 20),
     (19.9, 16, 20), (20, 20, 20), (24, 20, 20), (44, 20, 20)],
)  # fmt: skip
def test_eq_20_and_21_against_a_table(epoch, eq20, eq21):
    assert eq20_interval(epoch) == eq20
    assert eq21_interval(epoch) == eq21


def test_diff_is_the_relative_frobenius_norm():
    old, new = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 1.0], [1.0, 4.0]])
    assert relative_change(new, old).item() == pytest.approx(math.sqrt(2) / 5)
    assert relative_change(old, torch.zeros(2, 2)).item() == math.inf


# Intervals


def test_an_interval_counts_from_the_last_refresh():
    schedule = IntervalRefresh(lambda iteration: 1 if iteration < 5 else 4)
    assert refreshed_at(schedule, ("conv", "A"), 20) == [0, 1, 2, 3, 4, 8, 12, 16]


def test_matrices_may_have_intervals_of_their_own():
    schedule = IntervalRefresh(lambda iteration: 2, interval_multiplier={"A": 3})
    assert refreshed_at(schedule, ("conv", "A"), 13) == [0, 6, 12]
    schedule = IntervalRefresh(lambda iteration: 2, interval_multiplier={"A": 3})
    assert refreshed_at(schedule, ("conv", "G"), 7) == [0, 2, 4, 6]
    assert schedule.expected_interval(("conv", "A"), 0) == 6


def test_asking_what_is_due_changes_nothing():
    for schedule in (IntervalRefresh(lambda iteration: 3), AdaptiveRefresh(0.1, 10)):
        before = schedule.state_dict()
        assert schedule.due(KEYS, 0) == KEYS
        assert schedule.due(KEYS, 0) == KEYS
        assert schedule.state_dict() == before


# The adaptive rule


def test_a_stationary_matrix_reaches_the_longest_interval_like_fibonacci():
    schedule = AdaptiveRefresh(threshold=0.1, max_interval=20)
    schedule.record(0, {KEYS[0]: math.inf})
    intervals = [schedule.expected_interval(KEYS[0], 0)]
    iteration = 0
    for _ in range(9):
        iteration += intervals[-1]
        schedule.record(iteration, {KEYS[0]: 0.05})
        intervals.append(schedule.expected_interval(KEYS[0], iteration))
    assert intervals == [1, 2, 3, 5, 8, 13, 20, 20, 20, 20]


def test_a_change_above_the_threshold_halves_the_interval_at_once():
    schedule = AdaptiveRefresh(threshold=0.1, max_interval=20)
    for iteration in range(0, 200, 20):
        schedule.record(iteration, {KEYS[0]: 0.0})
    intervals = []
    for iteration in range(200, 206):
        schedule.record(iteration, {KEYS[0]: 0.11})
        intervals.append(schedule.expected_interval(KEYS[0], iteration))
    assert intervals == [10, 5, 2, 1, 1, 1]


def test_before_the_given_iteration_everything_is_refreshed_every_time():
    schedule = AdaptiveRefresh(threshold=0.1, max_interval=8, after_iteration=10)
    assert refreshed_at(schedule, KEYS[0], 12)[:11] == list(range(11))


def test_refreshes_are_spread_over_iterations():
    keys = [(f"layer{number}", "A") for number in range(40)]
    schedule = AdaptiveRefresh(threshold=0.1, max_interval=20)
    schedule.plan_for(dict.fromkeys(keys, 1.0))
    counts: Counter[int] = Counter()
    last: dict[FactorKey, int] = {}
    for iteration in range(400):
        due = schedule.due(keys, iteration)
        counts[iteration] = len(due)
        for key in due:
            assert iteration - last.get(key, iteration) <= 20
            last[key] = iteration
        schedule.record(iteration, dict.fromkeys(due, 0.0))
    late = [counts[iteration] for iteration in range(200, 400)]
    assert max(late) <= 10  # all 40 together would be the worst, 2 to 3 the best
    assert sum(late) <= 40 * 200 / 15 + 40  # never earlier than three quarters of the interval


@pytest.mark.parametrize("make", [lambda: AdaptiveRefresh(0.1, 12), lambda: IntervalRefresh(lambda iteration: 5)])
def test_a_restored_schedule_goes_on_alike(make):
    schedule, restored = make(), make()
    refreshed_at(schedule, KEYS[0], 17)
    restored.load_state_dict(schedule.state_dict())
    for iteration in range(17, 60):
        assert restored.due(KEYS, iteration) == schedule.due(KEYS, iteration)
        changes = dict.fromkeys(schedule.due(KEYS, iteration), 0.2 if iteration == 40 else 0.0)
        schedule.record(iteration, changes)
        restored.record(iteration, changes)


# In the optimizer


def refreshes(optimizer: KFAC) -> dict[FactorKey, int]:
    return {
        (name, matrix): count
        for name, block in optimizer.state_dict()["kfac"]["blocks"].items()
        for matrix, count in block["num_averaged"].items()
    }


def test_interval_one_equals_the_plain_optimizer_exactly():
    nets = [make_net(), make_net(), make_net()]
    schedules = [1, IntervalRefresh(lambda iteration: 1), AdaptiveRefresh(0.1, 9, after_iteration=100)]
    for net, schedule in zip(nets, schedules, strict=True):
        train(net, make_kfac(net, refresh=schedule), steps=4)
    assert_equal(weights(nets[1]), weights(nets[0]))
    assert_equal(weights(nets[2]), weights(nets[0]))


def test_a_stale_iteration_sends_gradients_alone_and_captures_nothing():
    net = make_net()
    optimizer = make_kfac(net, refresh=3)
    values = sum(parameter.numel() for parameter in net.parameters())
    triangles = sum(n * (n + 1) // 2 for n in (19, 3, 76, 4)) + 6  # A and G of both layers, diagonal BatchNorm
    expected = [triangles + 2 * values, 2 * values, 2 * values, triangles + 2 * values]
    for step, count in enumerate(expected):
        before = optimizer.communicator.payload_bytes
        optimizer.zero_grad()
        backward(net, step)
        assert bool(optimizer._fisher.capture.captured) == (step % 3 == 0)
        optimizer.step()
        assert optimizer.communicator.payload_bytes - before == 8 * count


def test_only_what_is_due_is_refreshed():
    net = make_net()
    optimizer = make_kfac(net, refresh=IntervalRefresh(lambda iteration: 1, interval_multiplier={"A": 4, "F": 2}))
    train(net, optimizer, steps=8)
    counts = {"A": 2, "G": 8, "F": 4}
    assert refreshes(optimizer) == {key: counts[key[1]] for key in refreshes(optimizer)}


def test_tracked_changes_are_diffs_of_successive_factors():
    net = make_net()
    optimizer = make_kfac(net, lr=0.0, track_changes=True)
    train(net, optimizer, steps=1)
    assert set(optimizer.report.changes.values()) == {math.inf}
    before = {key: value.clone() for key, value in optimizer._fisher.owned["0"].running.items()}
    train(net, optimizer, steps=1, first=1)
    for matrix in ("A", "G"):
        expected = relative_change(optimizer._fisher.owned["0"].running[matrix], before[matrix]).item()
        assert optimizer.report.changes["0", matrix] == pytest.approx(expected, rel=1e-12)
    assert len(optimizer.report.changes) == 5


def test_tracked_changes_of_a_running_average():
    net = make_net()
    optimizer = make_kfac(net, lr=0.0, track_changes=True, ema_decay=0.9)
    train(net, optimizer, steps=3)
    before = optimizer._fisher.owned["4"].running["G"].clone()
    train(net, optimizer, steps=1, first=3)
    expected = relative_change(optimizer._fisher.owned["4"].running["G"], before).item()
    assert optimizer.report.changes["4", "G"] == pytest.approx(expected, rel=1e-10)


def test_adaptive_intervals_grow_on_stationary_data_and_shrink_when_the_data_are_switched():
    net = make_net()
    schedule = AdaptiveRefresh(threshold=0.05, max_interval=10)
    optimizer = make_kfac(net, lr=0.0, refresh=schedule)  # weights at rest: the same batch gives the same matrices
    for _ in range(60):
        train(net, optimizer, steps=1, first=0)
    keys = [(block.name, matrix) for block in optimizer.blocks for matrix in block.factor_shapes]
    assert [schedule.expected_interval(key, 60) for key in keys] == [10] * 5
    counts = refreshes(optimizer)
    assert max(counts.values()) <= 14  # of 60

    for step in range(40):  # another batch each time
        train(net, optimizer, steps=1, first=step)
    assert [schedule.expected_interval(key, 100) for key in keys] == [1] * 5
    assert min(refreshes(optimizer)[key] - counts[key] for key in keys) >= 25  # of 40


def test_an_interval_that_is_no_function_is_refused_at_once():
    with pytest.raises(
        TypeError, match=r"interval_at must be a function of the iteration, got 2: .* lambda iteration: 2"
    ):
        IntervalRefresh(2)  # type: ignore[arg-type]

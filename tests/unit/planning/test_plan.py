"""What follows from predictions, and how it is told."""

import json
import re
from typing import Any

import pytest

from kfac_dist.config.load import create_config
from kfac_dist.config.schema import Config
from kfac_dist.errors import InputError
from kfac_dist.planning.plan import INTERVALS, make_plan
from kfac_dist.planning.plan_text import describe_plan, duration
from kfac_dist.plots.plan import draw_plan
from tests.unit.planning.machines import machine

LINK = {"latency_seconds": 0.0, "gigabytes_per_second": 1.0, "efficiency": 1.0, "source": "made up"}
NETWORK = {"intra_node": LINK, "inter_node": LINK}


def configuration(interval: int = 1, **changes: Any) -> Config:
    damping = {"initial": 0.1, "target": 0.1, "warmup_steps": 0, "batchnorm_ratio": 16}
    settings: dict[str, Any] = {
        "run": {"name": "planned"},
        "data": {"name": "digits"},
        "model": {"name": "digits_cnn"},
        "batch": {"global_size": 64, "per_rank": 4},
        "train": {"epochs": 10},
        "optimizer": {"name": "kfac", "learning_rate": 0.1, "momentum": 0.9},
        "kfac": {"damping": damping, "refresh": {"schedule": "every", "interval": interval}},
        "schedule": {"kind": "constant"},
    }
    return create_config(settings | changes, "a test")


def slow_network(latency: float = 0.0) -> dict[str, Any]:
    link = LINK | {"latency_seconds": latency}
    return {"intra_node": link, "inter_node": link}


def test_without_ranks_it_takes_the_powers_of_two_over_which_the_batch_divides():
    plan = make_plan(configuration(batch={"global_size": 48, "per_rank": 4}), machine(), None, grow_batch=False)
    assert [point.num_ranks for point in plan.points] == [1, 2, 4]
    assert [point.slots for point in plan.points] == [12, 6, 3]
    assert {point.batch for point in plan.points} == {48}


def test_a_batch_that_grows_gives_each_rank_one_slot():
    plan = make_plan(configuration(), machine(), [1, 3, 64], grow_batch=True)
    assert [(point.num_ranks, point.slots, point.batch) for point in plan.points] == [
        (1, 1, 4),
        (3, 1, 12),
        (64, 1, 256),
    ]
    assert [point.num_iterations for point in plan.points] == [3595, 1199, 57], "1,438 images, ten times"


def test_efficiency_is_of_images_a_second_and_rank():
    plan = make_plan(configuration(), machine(network=NETWORK), [1, 4, 16], grow_batch=False)
    speeds = [point.batch / point.seconds / point.num_ranks for point in plan.points]
    assert plan.efficiencies == pytest.approx([speed / max(speeds) for speed in speeds])
    assert plan.nodes == [1, 1, 4]


def test_where_it_stops_paying():
    # Nothing but sending: on 2 ranks 3 steps or more, on 4 more of them
    costly = machine(network=slow_network(10.0), launch_seconds=0.1)
    plan = make_plan(configuration(), costly, [1, 2, 4, 8], grow_batch=False)
    late = next(number for number, efficiency in enumerate(plan.efficiencies) if efficiency < 0.5)
    assert plan.stops_paying == plan.points[late].num_ranks
    assert plan.best is not None
    assert plan.best < late
    fast = slow_network() | {"intra_node": LINK | {"latency_seconds": 0.0, "gigabytes_per_second": 1e9}}
    free = make_plan(configuration(), machine(network=fast), [1, 2], grow_batch=False)
    assert free.stops_paying is None
    assert free.best == free.fastest == 1


def test_what_does_not_fit_is_not_best():
    plan = make_plan(configuration(), machine(memory={"gibibytes": 1e-6}), [1, 2], grow_batch=False)
    assert (plan.fits, plan.best, plan.fastest, plan.best_slot_size) == ([False, False], None, None, None)
    text = describe_plan(plan, configuration(), machine(memory={"gibibytes": 1e-6}), "tiny")
    assert "no number of ranks has the memory: set a smaller batch.per_rank" in text
    assert "!: more than the 1e-06 GiB that there are" in text


def test_the_best_interval_is_the_shortest_that_is_nearly_as_fast_as_the_longest():
    plan = make_plan(configuration(), machine(network=NETWORK), [2], grow_batch=False)
    assert list(plan.intervals) == list(INTERVALS)
    least = min(plan.intervals.values())
    assert plan.best_interval is not None
    assert plan.intervals[plan.best_interval] <= 1.1 * least
    assert all(seconds > 1.1 * least for n, seconds in plan.intervals.items() if n < plan.best_interval)
    assert plan.intervals[1] == pytest.approx(plan.points[0].seconds)


def test_larger_slots_save_launches():
    plan = make_plan(configuration(), machine(launch_seconds=1.0, network=NETWORK), [2], grow_batch=False)
    assert {size: point.slots for size, point in plan.slot_sizes.items()} == {2: 16, 4: 8, 8: 4, 16: 2}
    assert plan.best_slot_size == 16
    text = describe_plan(plan, configuration(), machine(), "mine")
    assert "best slots: batch.per_rank=16 in 2" in text
    assert "not 4 as configured" in text


def test_the_table_has_a_row_for_each_number_of_ranks_and_its_shares_are_whole():
    config, profile = configuration(10), machine(network=NETWORK)
    plan = make_plan(config, profile, [1, 2, 4], grow_batch=False)
    text = describe_plan(plan, config, profile, "mine")
    rows = [line.split() for line in text.splitlines() if re.match(r"^ +\d+ +\d+ +\d+ ", line)]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    for row, point in zip(rows, plan.points, strict=True):
        assert float(row[5]) == pytest.approx(point.seconds, rel=1e-3)
        assert sum(map(float, row[6:14])) == pytest.approx(100, abs=4)
        assert row[4] == "9.78", "225 iterations, 23 of them with a refresh"
        assert " ".join(row[17:]) == duration(3600 * point.hours)
    assert "profile mine: round figures" in text
    assert "planned: digits_cnn on digits, kfac, fp32, 225 iterations" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.09831, "0.098 s"),
        (1.288, "1.3 s"),
        (59.4, "59 s"),
        (59.5, "1 min 0 s"),
        (250.2, "4 min 10 s"),
        (3599.4, "59 min 59 s"),
        (3599.5, "1.0 h"),
        (11520.0, "3.2 h"),
        (4.5e6, "1,250.0 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_best_and_the_fastest_tell_time_and_memory() -> None:
    config, profile = configuration(), machine(network=slow_network(0.01), launch_seconds=0.001)
    plan = make_plan(config, profile, [1, 2, 4, 8], grow_batch=False)
    assert plan.best is not None
    assert plan.fastest is not None
    assert plan.best != plan.fastest
    text = describe_plan(plan, config, profile, "mine")
    for word, number in (("best", plan.best), ("fastest", plan.fastest)):
        point = plan.points[number]
        (line,) = re.findall(rf"^{word}: .*", text, re.MULTILINE)
        assert f"{point.num_ranks} ranks, slots on each: {point.slots}; " in line
        assert f"; {point.seconds:.4g} s/iter, {point.memory_bytes / 2**20:.0f} MiB/rank, " in line
        assert line.endswith(f", {duration(3600 * point.hours)} in all")


def test_sgd_has_no_refresh():
    config = configuration(kfac=None, optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})
    plan = make_plan(config, machine(), [1, 2], grow_batch=False)
    assert (plan.intervals, plan.best_interval) == ({}, None)
    record = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert record["points"][0]["refresh_interval"] is None
    assert "refresh on" not in describe_plan(plan, config, machine(), "mine")


@pytest.mark.parametrize("name", ["muon", "adamw", "lars", "sgd"])
def test_the_plan_says_that_other_updates_are_predicted_as_sgd(name):
    config = configuration(kfac=None, optimizer={"name": name, "learning_rate": 0.1, "momentum": 0.9})
    text = describe_plan(make_plan(config, machine(), [1], grow_batch=False), config, machine(), "mine")
    assert (f"{name} is predicted as SGD: what its own update takes, and keeps, is left out" in text) == (name != "sgd")


def test_the_plan_says_that_it_was_not_measured_and_how_much_memory_there_is():
    profile = machine(memory={"gibibytes": 80})
    text = describe_plan(make_plan(configuration(), profile, [1], grow_batch=False), configuration(), profile, "mine")
    assert "memory of the fullest rank, of the profile's 81,920 MiB" in text
    assert "predicted from the profile's rates, not measured" in text


def test_numbers_that_do_not_divide_are_refused_with_a_remedy():
    message = r"--ranks 3: batch\.global_size must be a multiple of .* got 64; .*--grow-batch"
    with pytest.raises(InputError, match=message):
        make_plan(configuration(), machine(), [1, 3], grow_batch=False)


def test_the_picture_shows_every_point_and_all_of_each_iteration():
    plan = make_plan(configuration(10), machine(network=NETWORK), [1, 2, 4], grow_batch=False)
    seconds, shares = draw_plan(plan.points, "a title").axes
    lines = {line.get_label(): line for line in seconds.get_lines()}
    assert list(lines) == ["mean of the run", "with a refresh", "without", "SGD"]
    assert lines["mean of the run"].get_ydata().tolist() == [point.seconds for point in plan.points]
    tops = [max(bar.get_y() + bar.get_height() for bar in shares.patches if bar.get_x() < place < bar.get_x() + 1)
            for place in range(3)]  # fmt: skip
    assert tops == pytest.approx([100, 100, 100])
    always = make_plan(configuration(1), machine(), [1, 2], grow_batch=False)
    assert [line.get_label() for line in draw_plan(always.points, "a title").axes[0].get_lines()] == [
        "mean of the run",
        "SGD",
    ]

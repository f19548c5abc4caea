"""From the `kfac` section of a configuration to schedules and settings. One process."""

from typing import Any

import pytest

from kfac_dist import KFAC, SGD, create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.config.schema import Config
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError
from kfac_dist.timing import StageTimer
from kfac_dist.training.build import Parts, create_optimizer, create_refresh
from kfac_dist.training.schedules import Schedules
from tests.paths import QUICKSTART
from tests.small_net import make_net, train


def schedules(config: Config) -> Schedules:
    batch = config.batch
    return Schedules(config, SlotSampler(1438, batch.per_rank, batch.global_size // batch.per_rank, seed=0))


def refresh_of(*overrides: str) -> Any:
    config = load_config(QUICKSTART, overrides)
    assert config.kfac is not None
    return create_refresh(config.kfac.refresh, lambda iteration: iteration / 100)


def intervals(schedule: Any, iterations: list[int], matrix: str = "G") -> list[int]:
    return [schedule.expected_interval(("layer", matrix), iteration) for iteration in iterations]


def test_every_with_a_multiplier_for_each_kind_of_matrix():
    schedule = refresh_of(
        "kfac.refresh={schedule: every, interval: 2, interval_multiplier: {input_factor: 5, batchnorm: 3}}"
    )
    assert [intervals(schedule, [0], matrix) for matrix in "AGF"] == [[10], [2], [6]]


def test_the_papers_schedules_start_after_iteration_500():
    places = [0, 499, 500, 501, 999, 1000, 1299, 1300, 2500]
    assert intervals(refresh_of("kfac.refresh={schedule: eq20}"), places) == [1, 1, 1, 6, 6, 11, 11, 11, 20]
    assert intervals(refresh_of("kfac.refresh={schedule: eq21}"), places) == [1, 1, 1, 1, 1, 1, 1, 20, 20]
    late = refresh_of("kfac.refresh={schedule: eq21, after_iteration: 2000}")
    assert intervals(late, places) == [1, 1, 1, 1, 1, 1, 1, 1, 20]


def test_adaptive_keys_reach_the_rule():
    schedule = refresh_of("kfac.refresh={schedule: adaptive, threshold: 0.3, max_interval: 4, after_iteration: 2}")
    key = ("layer", "A")
    for iteration, change, expected in [(0, 0.1, 1), (2, 0.29, 2), (4, 0.1, 3), (7, 0.1, 4), (11, 0.31, 2)]:
        schedule.record(iteration, {key: change})
        assert schedule.expected_interval(key, iteration) == expected, iteration


def test_unknown_keys_of_a_schedule_are_refused():
    with pytest.raises(InputError, match=r"kfac\.refresh.*interval"):
        refresh_of("kfac.refresh={schedule: eq21, interval: 5}")


def test_settings_reach_the_optimizers():
    overrides = ["optimizer.learning_rate=0.07", "optimizer.weight_decay=0.01", "kfac.ema_decay=0.9",
                 "kfac.sample_fraction=0.5",
                 "kfac.batchnorm=unit", "kfac.skip=['4']", "kfac.monitor.diff=true"]  # fmt: skip
    config = load_config(QUICKSTART, overrides)
    communicator = create_communicator("reduce")
    net = make_net()
    kfac = create_optimizer(config, Parts(net, communicator, 3, schedules(config), StageTimer()))
    assert isinstance(kfac, KFAC)
    group = kfac.param_groups[0]
    expected = {"lr": 0.07, "momentum": 0.9, "damping": 0.025, "batchnorm_damping_ratio": 16, "weight_decay": 0.01,
                "weight_rescaling": "always"}  # fmt: skip
    assert {name: group[name] for name in expected} == expected
    assert [block.form for block in kfac.blocks] == ["kronecker", "unit", "plain"]
    assert kfac.accumulation_steps == 3
    assert kfac._fisher.capture.sample_fraction == 0.5
    kfac.accumulation_steps = None
    train(net, kfac, steps=1)
    assert set(kfac.report.changes) == {("0", "A"), ("0", "G"), ("1", "F")}

    sgd_overrides = ["optimizer.name=sgd", "kfac=null", "optimizer.weight_decay=0.02"]
    config = load_config(QUICKSTART, sgd_overrides)
    sgd = create_optimizer(config, Parts(make_net(), communicator, 1, schedules(config), StageTimer()))
    assert isinstance(sgd, SGD)
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["weight_decay"]) == (0.03, 0.02)

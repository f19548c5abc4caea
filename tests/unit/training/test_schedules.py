"""Eq. 13-16 against numbers worked out by hand and against the recurrence."""

import math
from types import SimpleNamespace

import pytest

from kfac_dist.config.schedule import ConstantSchedule, CosineSchedule, OneCycleSchedule, PolynomialSchedule
from kfac_dist.errors import InputError
from kfac_dist.training import schedules


def test_polynomial_decay_is_constant_then_decays_to_zero() -> None:
    decay = {"initial": 0.03, "power": 2.0, "start": 2.0, "end": 10.0}
    assert schedules.polynomial_decay(0.0, **decay) == 0.03
    assert schedules.polynomial_decay(2.0, **decay) == 0.03
    assert schedules.polynomial_decay(4.0, **decay) == pytest.approx(0.03 * 0.75**2, rel=1e-14)
    assert schedules.polynomial_decay(8.0, **decay) == pytest.approx(0.03 / 16, rel=1e-14)
    assert schedules.polynomial_decay(10.0, **decay) == 0.0
    assert schedules.polynomial_decay(99.0, **decay) == 0.0


def test_polynomial_decay_of_the_paper_at_the_last_epoch() -> None:
    # Batch 32,768: e = 45 of [1.5, 49.5], power 3.5.
    expected = 3.0e-2 * (4.5 / 48.0) ** 3.5
    assert schedules.polynomial_decay(45.0, 3.0e-2, 3.5, 1.5, 49.5) == pytest.approx(expected, rel=1e-13)


def test_cosine_decay() -> None:
    assert schedules.cosine_decay(0.0, 0.4, 8.0) == 0.4
    assert schedules.cosine_decay(2.0, 0.4, 8.0) == pytest.approx(0.2 * (1 + math.sqrt(0.5)), rel=1e-14)
    assert schedules.cosine_decay(4.0, 0.4, 8.0) == pytest.approx(0.2, rel=1e-14)
    assert schedules.cosine_decay(8.0, 0.4, 8.0) == 0.0
    assert schedules.cosine_decay(12.0, 0.4, 8.0) == 0.0


def test_one_cycle_is_a_triangle() -> None:
    values = [schedules.one_cycle(epoch, 0.4, 0.25, 8.0) for epoch in (0.0, 1.0, 2.0, 5.0, 8.0, 9.0)]
    assert values == pytest.approx([0.016, (0.016 + 0.4) / 2, 0.4, 0.2, 0.0, 0.0], rel=1e-14)


def test_warmup_factor() -> None:
    assert [schedules.warmup_factor(epoch, 2.0) for epoch in (0.0, 0.5, 2.0, 3.0)] == [0.0, 0.25, 1.0, 1.0]
    assert schedules.warmup_factor(0.0, 0.0) == 1.0


def test_coupled_momentum_keeps_the_ratio() -> None:
    assert schedules.coupled_momentum(0.03, 0.03, 0.97) == 0.97
    assert schedules.coupled_momentum(0.015, 0.03, 0.97) == pytest.approx(0.485, rel=1e-14)
    assert schedules.coupled_momentum(0.0, 0.03, 0.97) == 0.0


@pytest.mark.parametrize(
    ("initial", "target", "warmup_steps"),
    [(2.5e-2, 2.5e-4, 313), (0.1, 0.001, 4), (0.25, 0.1, 1), (0.02, 0.02, 7)],
)
def test_damping_is_the_recurrence(initial: float, target: float, warmup_steps: int) -> None:
    alpha = 2 * math.log10(initial / target) / warmup_steps
    damping = initial
    for step in range(30):
        assert schedules.damping_at(step, initial, target, warmup_steps) == pytest.approx(damping, rel=1e-12)
        damping = (1 - alpha) * damping + alpha * target


def test_damping_constant_without_warmup() -> None:
    assert [schedules.damping_at(step, 0.02, 0.02, 0) for step in (0, 1, 1000)] == [0.02] * 3


@pytest.mark.parametrize(
    ("initial", "target", "warmup_steps", "remedy"),
    [(0.1, 0.001, 3, "must be >= 4"), (0.1, 0.001, 0, "must be >= 4"), (0.001, 0.1, 100, "must be <= ")],
)
def test_damping_that_would_turn_negative_or_diverge_is_refused(
    initial: float, target: float, warmup_steps: int, remedy: str
) -> None:
    with pytest.raises(InputError, match=remedy):
        schedules.damping_at(0, initial, target, warmup_steps)


def test_schedules_from_configuration() -> None:
    polynomial = PolynomialSchedule(kind="polynomial", power=2.0, start_epoch=2.0, end_epoch=10.0, warmup_epochs=4.0)
    schedule = schedules.LearningRateSchedule.from_config(polynomial, 0.8)
    assert schedule.at(1.0) == pytest.approx(0.2, rel=1e-14)
    assert schedule.at(3.0) == pytest.approx(0.8 * 0.75 * (7 / 8) ** 2, rel=1e-14)
    assert schedule.at(6.0) == pytest.approx(0.2, rel=1e-14)

    cosine = CosineSchedule(kind="cosine", end_epoch=8.0, warmup_epochs=1.0)
    schedule = schedules.LearningRateSchedule.from_config(cosine, 0.4)
    assert schedule.at(0.5) == pytest.approx(0.1 * (1 + math.cos(math.pi / 16)), rel=1e-14)
    assert schedule.at(4.0) == pytest.approx(0.2, rel=1e-14)

    triangle = OneCycleSchedule(kind="one_cycle", end_epoch=8.0, rising=0.5)
    schedule = schedules.LearningRateSchedule.from_config(triangle, 0.4)
    assert [schedule.at(epoch) for epoch in (4.0, 6.0)] == pytest.approx([0.4, 0.2], rel=1e-14)

    linear = PolynomialSchedule(kind="polynomial", power=1.0, start_epoch=0.0, end_epoch=8.0)
    schedule = schedules.LearningRateSchedule.from_config(linear, 0.4)
    assert [schedule.at(epoch) for epoch in (0.0, 2.0, 8.0)] == pytest.approx([0.4, 0.3, 0.0], rel=1e-14)

    schedule = schedules.LearningRateSchedule.from_config(ConstantSchedule(kind="constant"), 0.3)
    assert [schedule.at(epoch) for epoch in (0.0, 50.0)] == [0.3, 0.3]
    schedule = schedules.LearningRateSchedule.from_config(ConstantSchedule(kind="constant", warmup_epochs=2.0), 0.3)
    assert schedule.at(1.0) == pytest.approx(0.15, rel=1e-14)


def test_a_kind_that_nobody_made_a_learning_rate_for_is_no_constant_one() -> None:
    """Defect: a kind that was added to the configuration alone trained at a constant rate, without a word."""
    with pytest.raises(AssertionError, match="stairs"):
        schedules.LearningRateSchedule.from_config(SimpleNamespace(kind="stairs", warmup_epochs=0.0), 0.3)


def test_a_parameter_group_gets_the_settings_that_it_has_and_no_others() -> None:
    """Defect: AdamW's groups, and so its states, had a momentum that nothing reads."""
    groups = [{"lr": 1.0, "momentum": 0.5, "damping": 1.0}, {"lr": 1.0, "betas": (0.9, 0.99)}, {"lr": 1, "lr_ratio": 2}]
    schedules.Settings(learning_rate=0.1, momentum=0.9, damping=0.01).apply_to(groups)
    assert groups == [
        {"lr": 0.1, "momentum": 0.9, "damping": 0.01},
        {"lr": 0.1, "betas": (0.9, 0.99)},
        {"lr": 0.2, "lr_ratio": 2},
    ]

"""Running averages of the factors: a factor that is not finite leaves no trace in them."""

import math

import pytest
import torch
import torch.nn.functional as F

from kfac_dist.curvature.running import RunningAverage, _keep_finite_on_device, update_running_averages
from tests.small_net import make_batch, make_kfac, make_net, running
from tests.unit.curvature.layer_factors import random

DECAY = 0.8


def factors(count, dtype=torch.float64):
    roots = [random(2, 3, 3, seed=seed).to(dtype) for seed in range(count)]
    return [root @ root.mT for root in roots]


def average_of(given):
    average = RunningAverage()
    for factor in given:
        average.update(factor.clone(), DECAY)
    return average


def spoilt(factor, value):
    factor = factor.clone()
    factor[1, 2, 0] = value
    return factor


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [1, 2, 3])
def test_a_factor_that_is_not_finite_counts_as_one_more_of_the_average(position, bad):
    given = factors(4)
    average = average_of(given[:position])
    before = average.value.clone()
    average.update(spoilt(given[position], bad), DECAY)
    assert torch.equal(average.value, before)
    assert average.num_averaged == position + 1
    last = given[0] + 1
    average.update(last.clone(), DECAY)
    weights = [DECAY ** (position + 1 - index) for index in range(position + 2)]
    repeated = [*given[:position], before, last]
    expected = sum(weight * value for weight, value in zip(weights, repeated, strict=True)) / sum(weights)
    torch.testing.assert_close(average.value, expected)


@pytest.mark.parametrize("num_bad", [1, 2])
def test_before_any_finite_factor_the_first_one_that_is_is_the_average(num_bad):
    first, second = factors(2)
    average = average_of([spoilt(first, math.nan)] * num_bad)
    assert not average.value.isfinite().all()
    average.update(first.clone(), DECAY)
    assert torch.equal(average.value, first)
    average.update(second.clone(), DECAY)
    torch.testing.assert_close(average.value, average_of([first] * (num_bad + 1) + [second]).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_factors_are_averaged_to_the_bit_and_a_bad_one_spoils_no_other(dtype):
    averages, expected = [RunningAverage() for _ in range(3)], [None] * 3
    for step, factor in enumerate(factors(5, dtype)):
        given = [factor, spoilt(factor, math.nan) if step == 2 else factor, 1e18 * factor]
        weight = averages[0].next_weight(DECAY)
        for number, value in enumerate(given):
            if step == 0:
                expected[number] = value.clone()
            elif value.isfinite().all():
                expected[number].lerp_(value, weight)
        update_running_averages(
            [(average, value.clone()) for average, value in zip(averages, given, strict=True)], DECAY
        )
    for average, value in zip(averages, expected, strict=True):
        assert value.isfinite().all()
        assert torch.equal(average.value, value)


def test_a_device_chooses_as_the_host_does():
    first, second = factors(2)
    bad = torch.full_like(first, math.nan)
    pairs = [(first, second), (first, bad), (bad, second), (bad, bad)]
    old, new = ([pair[half].clone() for pair in pairs] for half in (0, 1))
    _keep_finite_on_device(old, new)
    torch._foreach_lerp_(old, new, 0.75)
    averages = [RunningAverage(pair[0].clone(), 1) for pair in pairs]
    update_running_averages(
        [(average, new.clone()) for average, (_, new) in zip(averages, pairs, strict=True)], 1 / 3
    )  # the second one weighs 3/4
    for value, average in zip(old, averages, strict=True):
        torch.testing.assert_close(value, average.value, equal_nan=True)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_after_one_bad_loss_training_goes_on(bad_step):
    net = make_net()
    optimizer = make_kfac(net, ema_decay=0.9)
    kept = []
    for step in range(5):
        optimizer.zero_grad()
        x, y = make_batch(step)
        (F.cross_entropy(net(x), y) * (math.nan if step == bad_step else 1.0)).backward()
        if step == bad_step:
            for parameter in net.parameters():
                parameter.grad.zero_()
        optimizer.step()
        kept.append(optimizer.report.kept_inverses)
    assert kept == ([3, 0, 0, 0, 0] if bad_step == 0 else [0] * 5)
    assert all(value.isfinite().all() for value in running(optimizer).values())

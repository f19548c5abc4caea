import math

import numpy as np
import pytest

from kfac_dist.report.bands import mean_and_range
from kfac_dist.report.curve import Curve, number
from kfac_dist.report.groups import Group
from kfac_dist.report.pair_page import mean_time, paired_difference


def curve(top1, seconds_an_epoch=1.0, offset=0.0):
    points = [
        {"iteration": 10 * n, "epoch": n + offset, "seconds": seconds_an_epoch * n, "test_top1": value}
        for n, value in enumerate(top1, start=1)
    ]
    return Curve.from_points(points)


def group(*finals, seeds=None, label="a"):
    return Group(label, "kfac", [curve([0.1, final]) for final in finals], seeds or list(range(len(finals))))


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), ("Infinity", math.inf), ("0.5", 0.5), (None, math.nan), ([], math.nan)]
)
def test_numbers_as_json_has_them(value, expected):
    np.testing.assert_equal(number(value), expected)


def test_between_evaluations_it_is_linear_and_outside_unknown():
    one = curve([0.2, 0.6, None, 0.8])
    np.testing.assert_allclose(one.at("epoch", np.array([1.0, 1.5, 3.0]), "test_top1"), [0.2, 0.4, 0.7])
    assert np.isnan(one.at("epoch", np.array([0.9, 4.1]), "test_top1")).all()
    assert np.isnan(one.at("epoch", 2.0, "train_loss"))


def test_reaching_an_accuracy_from_below_and_a_loss_from_above():
    one = curve([0.2, 0.6, None, 0.5])
    assert one.reaches("test_top1", 0.6) == 1
    assert one.reaches("test_top1", 0.61) is None
    falling = Curve.from_points([{"train_loss": 2.0}, {"train_loss": 0.5}])
    assert falling.reaches("train_loss", 1.0) == 1


def test_the_band_is_the_range_where_all_runs_are_known():
    curves = [curve([0.1, 0.2, 0.3]), curve([0.3, 0.4, 0.5], offset=0.5)]
    places, mean, low, high = mean_and_range(curves, "epoch", "test_top1")
    np.testing.assert_allclose(places, [1.5, 2.0, 3.0])
    np.testing.assert_allclose(low, [0.15, 0.2, 0.3])
    np.testing.assert_allclose(high, [0.3, 0.35, 0.45])
    np.testing.assert_allclose(mean, (low + high) / 2)


def test_by_the_clock_runs_are_compared_after_the_same_iterations():
    curves = [curve([0.1, 0.5], seconds_an_epoch=1.0), curve([0.3, 0.7], seconds_an_epoch=3.0)]
    places, mean, low, high = mean_and_range(curves, "seconds", "test_top1")
    np.testing.assert_allclose(places, [2.0, 4.0])  # means of 1 and 3, 2 and 6
    np.testing.assert_allclose(mean, [0.2, 0.6])
    np.testing.assert_allclose(low, [0.1, 0.5])
    np.testing.assert_allclose(high, [0.3, 0.7])


def test_without_any_evaluation_there_is_no_band():
    assert all(part.size == 0 for part in mean_and_range([], "seconds", "test_top1"))
    assert all(part.size == 0 for part in mean_and_range([Curve.from_points([])], "epoch", "test_top1"))


def test_the_time_to_a_level_is_that_of_the_mean():
    curves = [curve([0.1, 0.5, 0.9]), curve([0.3, 0.7, 0.7])]
    assert mean_time(curves, "epoch", 0.6) == 2
    assert mean_time(curves, "iteration", 0.61) == 30
    assert math.isnan(mean_time(curves, "epoch", 0.81))


def test_the_same_seeds_are_paired():
    # Differences 0.1 and 0.2: mean 0.15, standard error 0.05, t of one degree of freedom 12.706.
    difference, half, num_paired = paired_difference(group(0.8, 0.5), group(0.7, 0.3))
    assert (difference, num_paired) == (pytest.approx(0.15), 2)
    assert half == pytest.approx(12.706 * 0.05, rel=1e-4)


def test_pairs_follow_the_seeds_not_the_order():
    difference, half, _ = paired_difference(group(0.8, 0.5, seeds=[0, 1]), group(0.4, 0.7, seeds=[1, 0]))
    assert difference == pytest.approx(0.1)
    assert half == pytest.approx(0, abs=1e-9)


def test_other_seeds_are_compared_by_their_means():
    difference, half, num_paired = paired_difference(group(0.8, 0.5), group(0.7, 0.3, seeds=[5, 6]))
    assert (difference, num_paired) == (pytest.approx(0.15), 0)
    assert half > 0.3
    assert math.isnan(paired_difference(group(0.8), group(0.7))[1])  # one run each has no interval

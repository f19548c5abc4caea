"""Each finding on results that confirm it, contradict it, or decide nothing."""

import math

import numpy as np
import pytest
import scipy.stats

from kfac_dist.report.findings import half_interval, judge
from kfac_dist.report.results import read_study
from tests.unit.report.synthetic_study import curve_of, result, write_study

PERFORMANCE, SPEEDUP, EPOCHS, ITERATIONS, TILT = range(5)
LOSS = "train_loss<=0.5"
SIZES = (128, 256, 512, 1024)


def finding(folder, number, results, missing=()):
    return judge(read_study(write_study(folder / "study", results, missing)))[number]


def says(one):
    return [vote.says for vote in one.votes]


def accuracies(**by_optimizer):
    """One trial for each optimizer and batch size."""
    results = []
    for optimizer, values in by_optimizer.items():
        for size, top1 in zip(SIZES, values, strict=False):
            results.append(result(len(results), optimizer, size, None, top1))
    return results


@pytest.mark.parametrize(
    ("kfac", "verdict", "votes"),
    [
        ((0.705, 0.695, 0.70, 0.71), "confirmed", [1, 1, 1, 1]),
        ((0.80, 0.80, 0.80, 0.80), "contradicted", [-1, -1, -1, -1]),  # superior
        ((0.60, 0.60, 0.60, 0.70), "contradicted", [-1, -1, -1, 1]),  # inferior, three quarters
        ((0.70, 0.70, 0.80, 0.80), "undecided", [1, 1, -1, -1]),
    ],
)
def test_comparable_means_within_a_point(tmp_path, kfac, verdict, votes):
    one = finding(tmp_path, PERFORMANCE, accuracies(kfac=kfac, sgd=(0.70, 0.70, 0.70, 0.70)))
    assert one.verdict == verdict
    assert says(one) == votes


def test_the_best_of_each_grid_is_compared_and_the_number_is_told(tmp_path):
    results = accuracies(kfac=(0.75,), sgd=(0.70,))
    results.append(result(2, "kfac", 128, {"learning_rate": 0.3, "damping": 0.1}, 0.2))
    one = finding(tmp_path, PERFORMANCE, results)
    assert "Median of K-FAC − SGD: +5.00 points." in one.number
    assert one.votes[0].number == "75.00 − 70.00 = +5.00 points: superior"


def test_a_difference_inside_the_interval_of_the_seeds_is_no_vote(tmp_path):
    results = []
    for optimizer, values in {"kfac": (0.70, 0.78), "sgd": (0.66, 0.74)}.items():
        for seed, top1 in enumerate(values):
            results.append(result(len(results), optimizer, 128, None, top1, seed=seed))
    one = finding(tmp_path, PERFORMANCE, results)
    assert one.verdict == "undecided"
    assert says(one) == [0]
    assert "+4.00 points" in one.votes[0].number


def test_the_interval_is_welchs():
    a, b = (0.1, 0.2, 0.4), (0.5, 0.3, 0.2, 0.9)
    interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert half_interval(a, b) == pytest.approx((interval.high - interval.low) / 2)
    assert math.isnan(half_interval((0.1,), b))
    assert half_interval((0.1, 0.1), (0.2, 0.2)) == 0


def speeds(kfac, sgd, target=LOSS, lengths=(2000, 2000, 2000, 2000)):
    results = []
    for optimizer, iterations in (("kfac", kfac), ("sgd", sgd)):
        for size, found, length in zip(SIZES, iterations, lengths, strict=False):
            results.append(result(len(results), optimizer, size, iterations_to={target: found}, iterations=length))
    return results


@pytest.mark.parametrize(
    ("kfac", "sgd", "verdict"),
    [
        ((800, 600, 500, 400), (800, 500, 350, 250), "confirmed"),  # at 1,024 4 × and 2.5 × the ideal
        ((800, 500, 350, 250), (800, 600, 500, 400), "contradicted"),  # the other way round
        ((800, 400, 200, 100), (800, 600, 500, 400), "contradicted"),  # K-FAC keeps to the line
        ((800, 600, 500, 400), (800, 400, 200, 100), "contradicted"),  # SGD does: not both diminish
        ((800, 600, 500, 400), (800, 600, 500, 380), "undecided"),  # equally bad
        ((800, 600, 500, 380), (800, 600, 500, 400), "undecided"),
        ((800, 600, 500, None), (800, 600, 500, 400), "confirmed"),  # K-FAC does not come there any more
        ((800, 500, None, None), (800, 500, None, None), "undecided"),  # two batch sizes are too few
        ((800, 600), (800, 500), "undecided"),
        ((None,) * 4, (800, 600, 500, 400), "undecided"),  # nothing in common
    ],
)
def test_diminishing_returns(tmp_path, kfac, sgd, verdict):
    assert finding(tmp_path, SPEEDUP, speeds(kfac, sgd)).verdict == verdict


def test_the_deciding_number_of_diminishing_returns(tmp_path):
    one = finding(tmp_path, SPEEDUP, speeds((800, 600, 500, 400), (800, 500, 350, 250)))
    assert one.votes[0].number == "batch 128 → 1,024: K-FAC 4.00 × ideal, SGD 2.50 × ideal"
    assert "Median of K-FAC's excess ÷ SGD's: 1.60." in one.number


def test_a_target_that_one_does_not_reach_is_told_in_words(tmp_path):
    slow, fast = (800, 600, 500, None), (800, 600, 500, 400)
    assert "K-FAC does not reach the target" in finding(tmp_path / "a", SPEEDUP, speeds(slow, fast)).number
    assert "SGD does not reach the target" in finding(tmp_path / "b", SPEEDUP, speeds(fast, slow)).number


@pytest.mark.parametrize(
    ("kfac", "sgd", "verdict", "told"),
    [
        # Ten epochs: at 1,024 runs end at 125 iterations, 1.05 times K-FAC's ideal, so its excess may be below SGD's.
        (
            (950, 475, None, None),
            (500, 250, 140, 80),
            "undecided",
            "K-FAC does not reach it within 1.05 × ideal, SGD 1.28",
        ),
        ((500, 250, 140, 80), (950, 475, None, None), "undecided", "SGD does not reach it within 1.05 × ideal"),
        ((500, 250, 140, None), (500, 250, 140, 80), "confirmed", "K-FAC does not reach it within 2.00 × ideal"),
        ((500, 250, 140, 80), (500, 250, 140, None), "contradicted", "SGD does not reach it within 2.00 × ideal"),
        ((500, 250, 140, 70), (950, 475, None, None), "contradicted", "K-FAC 1.12 × ideal"),  # it stays on the line
    ],
)
def test_a_target_is_missed_only_as_far_as_runs_went(tmp_path, kfac, sgd, verdict, told):
    """Defect: with a budget of epochs, a run that ended on the ideal line was taken for one infinitely far from it."""
    one = finding(tmp_path, SPEEDUP, speeds(kfac, sgd, lengths=(1000, 500, 250, 125)))
    assert one.verdict == verdict
    assert told in one.votes[0].number


def test_the_median_is_of_ratios_that_are_known(tmp_path):
    """Defect: the mean of 1.60 and 0, for a target that SGD does not reach, was told as the median."""
    results = speeds((800, 600, 500, 400), (800, 500, 350, 250))
    for one, other in zip(results, speeds((800, 600, 500, 400), (800, 600, 500, None)), strict=True):
        one["iterations_to"]["train_loss<=0.1"] = other["iterations_to"][LOSS]
    one = finding(tmp_path, SPEEDUP, results)
    assert one.number.startswith(
        "Median of K-FAC's excess ÷ SGD's: 1.60. SGD does not reach the target at the largest batch size in 1 of 2 "
    )


def test_accuracy_targets_decide_only_where_there_is_no_loss_target(tmp_path):
    results = speeds((800, 600, 500, 400), (800, 500, 350, 250))
    for one in results:
        one["iterations_to"]["test_top1>=0.6"] = 100  # contradicts
    found = finding(tmp_path, SPEEDUP, results)
    assert [vote.where for vote in found.votes] == ["net, training loss ≤ 0.5"]
    alone = speeds((800, 600, 500, 400), (800, 500, 350, 250), target="test_top1>=0.6")
    assert finding(tmp_path / "alone", SPEEDUP, alone).verdict == "confirmed"


def regions(num_good, an_epoch=(32, 16, 8, 4), best=(0.8, 0.8, 0.8, 0.8)):
    """A grid of ten for each batch size, so many of them good throughout and the others at half the accuracy."""
    results = []
    for size, good, length, top in zip(SIZES, num_good, an_epoch, best, strict=True):
        for number in range(10):
            points = curve_of(1.0, 8, length, 1.0)
            for point in points:
                point["test_top1"] = top if number < good else top / 2
            parameters = {"learning_rate": 0.1 * (number + 1), "damping": 0.1}
            results.append(result(len(results), "kfac", size, parameters, points[-1]["test_top1"], curve=points))
    return results


@pytest.mark.parametrize(
    ("num_good", "shrinks", "widens"),
    [
        ((9, 7, 4, 2), "confirmed", "contradicted"),
        ((2, 4, 7, 9), "contradicted", "confirmed"),
        ((5, 5, 5, 5), "undecided", "undecided"),
        ((4, 3, 9, 6), "undecided", "undecided"),  # up and down: tau is 1/3
    ],
)
def test_the_region_shrinks_or_widens(tmp_path, num_good, shrinks, widens):
    folder = write_study(tmp_path / "study", regions(num_good, an_epoch=(4, 4, 4, 4)))
    findings = judge(read_study(folder))
    assert findings[EPOCHS].verdict == shrinks
    assert findings[ITERATIONS].verdict == widens


def test_both_readings_of_good_must_agree(tmp_path):
    # Within 5 % of each batch size's own best the region shrinks; within 5 % of the best of all it widens.
    one = finding(tmp_path, EPOCHS, regions((9, 7, 4, 2), best=(0.4, 0.4, 0.4, 0.8)))
    assert says(one) == [1, -1]
    assert one.verdict == "undecided"


def test_two_batch_sizes_decide_nothing_on_regions(tmp_path):
    results = [one for one in regions((9, 7, 4, 2)) if one["batch_size"] <= 256]
    one = finding(tmp_path, EPOCHS, results)
    assert one.verdict == "undecided"
    assert one.number == "No comparison is possible with these results: see the rule for what it takes."


def tilted(good):
    """A grid of 5 × 5 at two batch sizes; `good` says of row and column which are."""
    results = []
    for size in (128, 256):
        for row in range(5):
            for column in range(5):
                parameters = {"learning_rate": 10.0 ** (column - 4), "damping": 10.0 ** (row - 5)}
                results.append(result(len(results), "kfac", size, parameters, 0.8 if good(row, column) else 0.1))
    return results


@pytest.mark.parametrize(
    ("good", "verdict"),
    [
        (lambda row, column: abs(row - column) <= 1, "confirmed"),
        (lambda row, column: abs(row + column - 4) <= 1, "contradicted"),
        (lambda row, column: True, "undecided"),  # a square has no tilt
        (lambda row, column: (0 < row < 4 and 0 < column < 4) or row == column == 0, "undecided"),  # r = 0.37 by chance
        (lambda row, column: row == column == 2, "undecided"),  # nor has a point
        (lambda row, column: row == 2, "undecided"),  # nor a line along an axis
    ],
)
def test_the_tilt_of_damping_and_learning_rate(tmp_path, good, verdict):
    assert finding(tmp_path, TILT, tilted(good)).verdict == verdict


def test_the_deciding_number_of_the_tilt_is_the_correlation(tmp_path):
    one = finding(tmp_path, TILT, tilted(lambda row, column: abs(row - column) <= 1))
    places = [(row, column) for row in range(5) for column in range(5) if abs(row - column) <= 1]
    expected = np.corrcoef(np.array(places, dtype=float).T)[0, 1]
    assert one.number.startswith(f"r = {expected:+.2f}, 95 % interval")
    assert [vote.value for vote in one.votes] == pytest.approx([expected, expected])


def test_batch_sizes_that_are_not_finished_decide_nothing(tmp_path):
    results = accuracies(kfac=(0.8, 0.8), sgd=(0.7, 0.7))
    one = finding(tmp_path, PERFORMANCE, results, missing=[("net", "kfac", 256)])
    assert [vote.where for vote in one.votes] == ["net, batch 128"]


@pytest.mark.parametrize("optimizer", ["kfac", "sgd"])
def test_a_study_of_one_optimizer_does_not_compare(tmp_path, optimizer):
    findings = judge(read_study(write_study(tmp_path / "study", accuracies(**{optimizer: (0.7, 0.7, 0.7)}))))
    assert [findings[number].verdict for number in (PERFORMANCE, SPEEDUP)] == ["undecided", "undecided"]


def test_the_first_optimizer_of_a_name_stands_for_it(tmp_path):
    results = accuracies(**{"kfac-eq21": (0.7, 0.7, 0.7), "kfac": (0.9, 0.9, 0.9), "sgd": (0.7, 0.7, 0.7)})
    assert finding(tmp_path, PERFORMANCE, results).verdict == "confirmed"

import math

import numpy as np
import pytest

from kfac_dist.report.results import read_study
from kfac_dist.report.sensitivity import (
    correlation,
    final_grid,
    fixed_budget,
    good_points,
    make_grid,
    pooled_correlation,
    trend,
)
from kfac_dist.report.study_page import report_study
from tests.unit.report.synthetic_study import curve_of, result, write_study


def grid_of(top1):
    """A grid from rows of accuracies: damping 0.001, 0.01, … upwards, learning rate 0.01, 0.1, … to the right."""
    return make_grid(
        ({"learning_rate": 10.0 ** (column - 2), "damping": 10.0 ** (row - 3)}, value)
        for row, values in enumerate(top1)
        for column, value in enumerate(values)
    )


def test_the_share_within_five_percent_of_the_best():
    # 5 % of 0.80 is 0.04: 0.80, 0.77 and 0.76 are good, 0.75 is not.
    grid = grid_of([[0.80, 0.77, 0.75], [0.76, 0.0, 0.5]])
    np.testing.assert_array_equal(grid.good(), [[[True, True, False], [True, False, False]]])
    assert grid.share() == 0.5
    assert grid.share(best=0.84) == pytest.approx(1 / 6)  # of another grid's best: 0.798


def test_missing_configurations_are_in_no_share_and_diverged_ones_are_bad():
    assert grid_of([[0.8, 0.0], [math.nan, math.nan]]).share() == 0.5
    assert math.isnan(grid_of([[math.nan]]).share())
    assert grid_of([[0.0, 0.0]]).share() == 0  # all diverged: none is good


def test_a_grid_knows_its_axes():
    grid = grid_of([[0.1, 0.2], [0.3, 0.4]])
    assert grid.other == "damping"
    np.testing.assert_allclose(grid.rates, [0.01, 0.1])
    np.testing.assert_allclose(grid.others, [0.001, 0.01])
    np.testing.assert_allclose(grid.top1, [[0.1, 0.2], [0.3, 0.4]])


def test_the_best_over_parameters_beyond_two():
    values = [({"learning_rate": 0.1, "damping": 0.01, "decay": decay}, 0.5 + decay) for decay in (0.1, 0.3, 0.2)]
    np.testing.assert_allclose(make_grid(values).top1, [[0.8]])


def test_every_configuration_counts_in_the_share_with_parameters_beyond_two():
    """Defect: a pair of learning rate and damping that is good with one decay counted as good with all of them."""
    values = [
        ({"learning_rate": rate, "damping": damping, "decay": decay}, 0.8 if decay == 0.3 else 0.1)
        for rate in (0.1, 0.2) for damping in (0.01, 0.1) for decay in (0.1, 0.3, 0.2)
    ]  # fmt: skip
    grid = make_grid(values)
    assert grid.share() == pytest.approx(4 / 12)
    assert grid.top1.shape == (2, 2)
    assert good_points(make_grid([*values, (values[0][0] | {"decay": 0.4}, 0.8)]))[0].size == 5


def test_a_diagonal_region_is_fully_correlated():
    x, y = good_points(grid_of(np.eye(4)))
    np.testing.assert_allclose(x, [-2, -1, 0, 1])
    np.testing.assert_allclose(y, [-3, -2, -1, 0])
    assert correlation(x, y) == pytest.approx(1)
    assert correlation(*good_points(grid_of(np.eye(4)[::-1]))) == pytest.approx(-1)
    assert correlation(*good_points(grid_of(np.ones((3, 3))))) == pytest.approx(0)


def test_correlation_agrees_with_numpy():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    assert correlation(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])


def test_a_correlation_that_is_not_defined():
    assert math.isnan(correlation(np.array([0.0, 1.0]), np.array([0.0, 1.0])))
    assert math.isnan(correlation(np.zeros(4), np.arange(4.0)))


def test_groups_are_centred_before_they_are_pooled():
    # Falling within each group, rising from group to group: pooled within groups it falls.
    x = np.array([0.0, 1.0, 2.0])
    groups = [(x, -x), (x + 10, 10 - x)]
    assert np.corrcoef(np.concatenate([a for a, _ in groups]), np.concatenate([b for _, b in groups]))[0, 1] > 0.9
    assert pooled_correlation(groups)[0] == pytest.approx(-1)


def test_the_interval_is_fishers_with_a_degree_of_freedom_for_each_mean():
    rng = np.random.default_rng(1)
    groups = [(x, x + rng.normal(size=8)) for x in rng.normal(size=(3, 8))]
    r, low, high = pooled_correlation(groups)
    count = 3 * 7 + 1
    assert math.atanh(high) - math.atanh(r) == pytest.approx(1.959964 / math.sqrt(count - 3))
    assert math.atanh(r) - math.atanh(low) == pytest.approx(1.959964 / math.sqrt(count - 3))
    assert math.isnan(pooled_correlation([(np.arange(3.0), np.arange(3.0))])[1])  # 3 points have no interval


@pytest.mark.parametrize(
    ("values", "tau"), [((1, 2, 3), 1), ((3, 2, 1), -1), ((1, 3, 2), 1 / 3), ((1, 1, 1), 0), ((2, 1, 1), -2 / 3)]
)
def test_trend_is_kendalls(values, tau):
    assert trend(values) == pytest.approx(tau)


def study_of_budgets(folder):
    """Batch 128 trains 4 epochs of 8 iterations, 256 trains 8 of 4, 512 trains 12 of 2."""
    results = []
    for size, epochs, an_epoch in ((128, 4, 8), (256, 8, 4), (512, 12, 2)):
        for damping in (0.001, 0.01):
            points = curve_of(0.5 + damping, epochs, an_epoch, 1.0)
            results.append(
                result(
                    len(results), "kfac", size, {"learning_rate": 0.1, "damping": damping}, points[-1]["test_top1"],
                    curve=points, epochs=float(epochs), iterations=epochs * an_epoch,
                )
            )  # fmt: skip
    return read_study(write_study(folder, results))


def test_fixed_epochs_are_the_shortest_budget(tmp_path):
    study = study_of_budgets(tmp_path / "study")
    fixed = fixed_budget(study, "net", "kfac", "epoch")
    assert fixed.place == 4
    assert list(fixed.grids) == [128, 256, 512]
    np.testing.assert_allclose(fixed.grids[256].top1[:, 0], [study.trials[i].curve.test_top1[3] for i in (2, 3)])


def test_fixed_iterations_are_those_at_which_most_batch_sizes_compare(tmp_path):
    study = study_of_budgets(tmp_path / "study")
    fixed = fixed_budget(study, "net", "kfac", "iteration")
    assert fixed.place == 24  # the lengths are 32, 32 and 24
    assert list(fixed.grids) == [128, 256, 512]
    np.testing.assert_allclose(fixed.grids[128].top1[0, 0], study.trials[0].curve.test_top1[2])


def test_where_the_budget_is_fixed_epochs_these_are_the_end(tmp_path):
    """Defect: 10.01 epochs of runs that end at 10.24 were read between the last two evaluations, and shown again."""
    results = []
    for size, end in ((128, 10.01), (256, 10.24)):
        points = [*curve_of(0.5, 9, 8, 1.0), curve_of(0.6, 9, 8, 1.0)[-1] | {"epoch": end, "iteration": 80}]
        for damping in (0.1, 0.2):
            parameters = {"learning_rate": 0.1, "damping": damping}
            results.append(result(len(results), "kfac", size, parameters, 0.6, curve=points, epochs=end))
    budget = {"budget": {"rule": "fixed_epochs", "epochs": 10}}
    folder = write_study(tmp_path / "study", results, definition=budget)
    fixed = fixed_budget(read_study(folder), "net", "kfac", "epoch")
    assert fixed.place == 10
    assert {size: float(grid.top1[0, 0]) for size, grid in fixed.grids.items()} == {128: 0.6, 256: 0.6}
    report_study(folder)
    text = (folder / "report.md").read_text()
    assert ("after 80 iterations" in text, "after 10 epochs" in text) == (True, False)


def test_batch_sizes_whose_first_evaluation_comes_later_are_left_out(tmp_path):
    results = []
    for size, epochs, an_epoch in ((128, 2, 100), (256, 4, 8), (512, 8, 4)):
        points = curve_of(0.5, epochs, an_epoch, 1.0)
        results.append(result(len(results), "kfac", size, None, 0.5, curve=points))
    fixed = fixed_budget(read_study(write_study(tmp_path / "study", results)), "net", "kfac", "iteration")
    assert fixed.place == 32
    assert list(fixed.grids) == [256, 512]


def test_a_trial_that_diverged_counts_as_it_was_before_and_as_nothing_after(tmp_path):
    short = curve_of(0.5, 4, 8, 1.0)
    results = [
        result(0, "kfac", 128, {"learning_rate": 0.1, "damping": 0.1}, 0.5, curve=short),
        result(1, "kfac", 128, {"learning_rate": 0.2, "damping": 0.1}, None, status="diverged", curve=short[:1]),
        result(2, "kfac", 256, {"learning_rate": 0.1, "damping": 0.1}, 0.5, curve=curve_of(0.5, 4, 4, 1.0)),
    ]
    study = read_study(write_study(tmp_path / "study", results))
    fixed = fixed_budget(study, "net", "kfac", "iteration")
    assert fixed.place == 16
    assert fixed.grids[128].top1[0, 1] == 0
    np.testing.assert_allclose(final_grid(study.trials[:2]).top1, [[0.5, 0]])

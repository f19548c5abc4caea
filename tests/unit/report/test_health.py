import math

import numpy as np
import pytest

from kfac_dist.report.health import event_rows, relative_damping, spectra, staleness
from kfac_dist.report.runs import read_run_record
from tests.unit.report.synthetic_run import spectrum, write_run


def diff(iteration, layer, matrix, value=0.1):
    return {"kind": "fisher", "iteration": iteration, "layer": layer, "matrix": matrix, "diff": value}


def test_staleness_is_the_distance_of_a_matrix_s_refreshes():
    records = [diff(i, "0", "A") for i in (1, 2, 12)] + [diff(i, "4", "A") for i in (1, 6)]
    records += [diff(i, "0", "G") for i in (3, 4)] + [spectrum(8, "0", "A", 0, 1)]
    found = staleness(records)
    assert list(found) == ["A", "G"]
    assert (found["A"].shortest, found["A"].longest, found["A"].refreshes) == (1, 10, 5)
    assert found["A"].mean == pytest.approx((1 + 10 + 5) / 3)
    assert (found["G"].shortest, found["G"].longest) == (1, 1)
    assert staleness([diff(1, "0", "A")]) == {}


def test_spectra_are_the_range_over_layers_by_matrix():
    records = [
        spectrum(10, "0", "A", 1e-3, 4.0, 2.0), spectrum(10, "4", "A", 1e-2, 8.0, 6.0),
        spectrum(20, "0", "A", 1e-4, 2.0, 3.0), spectrum(10, "0", "G", 0.0, 1.0), diff(10, "0", "A"),
    ]  # fmt: skip
    found = spectra(records)["A"]
    np.testing.assert_array_equal(found.iterations, [10, 20])
    np.testing.assert_array_equal(found.smallest, [1e-3, 1e-4])
    np.testing.assert_array_equal(found.largest, [8, 2])
    np.testing.assert_array_equal(found.median_largest, [6, 2])
    np.testing.assert_array_equal(found.rank, [4, 3])


def test_damping_beside_the_curvature_is_the_median_over_factored_layers():
    train = [{"iteration": 10, "damping": 0.06}, {"iteration": 20, "damping": 0.03}]
    fisher = [
        spectrum(10, "0", "A", 0, 4.0), spectrum(10, "0", "G", 0, 0.5),  # 0.06 / 2
        spectrum(10, "4", "A", 0, 2.0), spectrum(10, "4", "G", 0, 0.3),  # 0.06 / 0.6
        spectrum(10, "1", "F", 0, 9.0),  # BatchNorm has no factors
        spectrum(20, "0", "A", 0, 3.0), spectrum(20, "0", "G", 0, 1.0),
    ]  # fmt: skip
    iterations, ratios = relative_damping(train, fisher)
    np.testing.assert_array_equal(iterations, [10, 20])
    np.testing.assert_allclose(ratios, [(0.03 + 0.1) / 2, 0.01])


def test_events_are_counted(tmp_path):
    events = [
        {"kind": "event", "iteration": 3, "event": "retry", "retries": 2, "kept_inverses": 1},
        {"kind": "event", "iteration": 9, "event": "retry", "retries": 5, "kept_inverses": 0},
        {"kind": "event", "iteration": 9, "event": "resumed", "ranks": 2},
        {"kind": "event", "iteration": 11, "event": "something_new"},
    ]
    rows = {row[0]: row[1:] for row in event_rows(read_run_record(write_run(tmp_path / "run", extra=events)))}
    assert rows["iterations in which a factorisation needed more damping"] == ["2", "3, 9"]
    assert rows["factorisations repeated"] == ["7", ""]
    assert rows["old inverses kept"] == ["1", ""]
    assert rows["starts from a checkpoint"] == ["1", "9"]
    assert rows["updates skipped because gradients overflowed"] == ["0", ""]
    assert rows["something_new"] == ["1", "11"]


def test_a_run_s_curve_counts_updates_training_seconds_and_mean_losses(tmp_path):
    run = read_run_record(write_run(tmp_path / "run", epochs=2, iterations_an_epoch=4))
    np.testing.assert_array_equal(run.curve.iteration, [4, 8])
    np.testing.assert_array_equal(run.curve.epoch, [1, 2])
    np.testing.assert_allclose(run.curve.seconds, [4 * 0.064, 8 * 0.064])  # 64 images at 1,000 per second
    losses = [record["loss"] for record in run.records["train"]]
    np.testing.assert_allclose(run.curve.train_loss, [np.mean(losses[:4]), np.mean(losses[4:])])
    np.testing.assert_allclose(run.curve.test_top1, [0.5, 0.75])
    assert run.is_finished
    assert run.optimizer == "kfac"


def test_a_run_without_its_configuration_has_a_curve_without_a_clock(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.yaml", "environment.json", "DONE"):
        (folder / name).unlink()
    run = read_run_record(folder)
    assert not run.is_finished
    assert math.isnan(run.curve.seconds[0])
    assert run.setting("kfac.damping") is None

import math

import pytest

from kfac_dist.errors import InputError
from kfac_dist.report.best import best_of, fastest_to, time_to
from kfac_dist.report.results import Cell, read_study
from kfac_dist.report.study_tables import best_table, time_table, to_csv
from tests.unit.report.synthetic_study import curve_of, result, write_study

CELL = Cell("net", 128, "kfac")


def parameters(rate, damping=0.01):
    return {"learning_rate": rate, "damping": damping}


@pytest.fixture
def study(tmp_path):
    results = [
        result(0, parameters=parameters(0.1), top1=0.70, loss=0.2),
        result(1, parameters=parameters(0.2), top1=0.72, loss=0.3),
        result(2, parameters=parameters(0.3), top1=0.60, loss=0.4),
        result(3, parameters=parameters(0.2), top1=0.66, loss=0.5, seed=1),
        result(4, parameters=parameters(0.4), top1=None, status="diverged", curve=[]),
        result(5, parameters=parameters(0.5), top1=0.99, status="failed", error="no memory"),
        result(6, "sgd", parameters={"learning_rate": 0.1, "momentum": 0.9}, top1=0.65),
    ]
    return read_study(write_study(tmp_path / "study", results, missing=[("net", "sgd", 128)]))


def test_the_best_is_chosen_on_the_grids_seed_and_told_over_all_seeds(study):
    best = best_of(study, CELL)
    assert [trial.index for trial in best.trials] == [1, 3]
    spread = best.spread("test_top1")
    assert (spread.mean, spread.lowest, spread.highest) == pytest.approx((0.69, 0.66, 0.72))


def test_the_best_by_loss_may_be_another_and_may_lie_at_the_edge(study):
    best = best_of(study, CELL, "train_loss")
    assert best.chosen.index == 0
    assert best.at_edge == ("learning_rate",)  # damping has one value, and so no edge
    assert best_of(study, CELL).at_edge == ()


def test_failed_trials_count_nowhere_and_diverged_ones_as_bad(study):
    assert [trial.index for trial in study.grid(CELL)] == [0, 1, 2, 4]
    assert study.grid(CELL)[-1].test_top1 == 0
    assert math.isnan(study.grid(CELL)[-1].train_loss)


def test_an_unfinished_cell_is_known(study):
    assert study.missing == {7}
    assert not study.is_complete(Cell("net", 128, "sgd"))


@pytest.mark.parametrize("status", ["done", "diverged", "failed"])
def test_a_failed_trial_leaves_its_cell_unfinished(tmp_path, status):
    """Defect: findings were decided by grids of which a part had failed, and perhaps the best."""
    study = read_study(write_study(tmp_path / "study", [result(0), result(1, status=status), result(2, "sgd")]))
    assert study.is_complete(CELL) is (status != "failed")
    assert study.is_complete(Cell("net", 128, "sgd"))


def test_a_manifest_that_does_not_tell_leaves_every_cell_unfinished(tmp_path):
    folder = write_study(tmp_path / "study", [result(0)])
    with (folder / "manifest.jsonl").open("a") as file:
        file.write('{"index": 1, "configuration": {}}\n')
    assert not read_study(folder).is_complete(CELL)


def test_optimizers_are_known_by_their_configuration(tmp_path):
    study = read_study(write_study(tmp_path / "study", [result(0, "kfac-stale"), result(1, "sgd")]))
    assert study.kinds == {"kfac-stale": "kfac", "sgd": "sgd"}
    definition = {"optimizers": {"mine": {"settings": {"optimizer.name": "kfac"}}}}
    folder = write_study(tmp_path / "other", [result(0, "mine")], definition=definition)
    (folder / "manifest.jsonl").write_text('{"index": 0}\n')
    assert read_study(folder).kinds == {"mine": "kfac"}


def test_time_to_a_level_is_that_of_the_first_evaluation_there(tmp_path):
    slow, fast = curve_of(0.8, 8, 10, 2.0, pace=0.2), curve_of(0.8, 8, 10, 3.0, pace=1.0)
    results = [result(0, curve=slow, top1=0.8), result(1, curve=fast, top1=0.8), result(2, top1=0.1)]
    trials = read_study(write_study(tmp_path / "study", results)).trials
    level = fast[1]["test_top1"]
    first = next(point for point in slow if point["test_top1"] >= level)
    assert first["epoch"] > 2
    found = time_to(trials, level)
    assert (found.num_reached, found.num_runs) == (2, 3)
    assert found.epochs == (2 + first["epoch"]) / 2
    assert found.seconds == (6.0 + first["seconds"]) / 2
    fastest = fastest_to(trials, level)
    assert (fastest.epochs, fastest.iterations, fastest.seconds) == (2, 20, 6)
    assert fastest_to(trials, 0.99).num_reached == 0


def test_the_table_has_a_line_for_each_result(study):
    lines = to_csv(study).splitlines()
    assert lines[0].startswith("index,model,batch_size,optimizer,seed,learning_rate,damping,momentum,status")
    assert len(lines) == 8
    assert lines[2].startswith("1,net,128,kfac,0,0.2,0.01,,done,4.0,100,10.0,12.0,0.3,0.72,0.72")
    assert lines[5].startswith("4,net,128,kfac,0,0.4,0.01,,diverged,4.0,100,10.0,12.0,,0.0,")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("study.yaml", None, "give the folder of a study"),
        ("manifest.jsonl", None, "give the folder of a study"),
        ("study.yaml", "- a list", "is not what a study writes.*; plan the study in another folder"),
        ("manifest.jsonl", "garbage", "is not what a study writes.*; plan the study in another folder"),
        ("results/00000.json", "{", "delete it and run its trial again"),
        ("results/00000.json", '{"index": 0}', "KeyError"),
        ("results/00000.json", "[]", "is not what a study writes"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, problem):
    folder = write_study(tmp_path / "study", [result(0)])
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=problem) as raised:
        read_study(folder)
    assert name.split("/")[-1] in str(raised.value)


def test_of_damaged_results_all_are_named(tmp_path):
    folder = write_study(tmp_path / "study", [result(0), result(1), result(2)])
    for number in (0, 2):
        (folder / f"results/0000{number}.json").write_text("{")
    with pytest.raises(InputError, match=r"00000\.json: is not .*\n.*00002\.json: is not [^\n]*$"):
        read_study(folder)


def test_a_result_of_another_trial_is_named(tmp_path):
    """Defect: a copy counted as one more trial."""
    folder = write_study(tmp_path / "study", [result(0), result(1)])
    (folder / "results/00002.json").write_text((folder / "results/00000.json").read_text())
    with pytest.raises(InputError, match=r"00002\.json: .* it is the result of trial 0"):
        read_study(folder)


def test_the_grids_seed_is_the_first_of_the_study(tmp_path):
    """Defect: the smallest was, so that another configuration was told than the one that got more seeds."""
    results = []
    for seed, accuracies in {1: (0.6, 0.8), 0: (0.8, 0.6)}.items():
        for rate, top1 in zip((0.1, 0.2), accuracies, strict=True):
            results.append(result(len(results), parameters=parameters(rate), top1=top1, seed=seed))
    results.append(result(4, parameters=parameters(0.2), top1=0.81, seed=7))
    study = read_study(write_study(tmp_path / "study", results, definition={"seeds": [1, 0]}))
    assert [trial.seed for trial in best_of(study, CELL).trials] == [1, 0, 7]
    other = read_study(write_study(tmp_path / "other", results, definition={"seeds": [5]}))
    assert other.grid_seed == 0


def test_of_seeds_without_a_value_the_table_tells(tmp_path):
    """Defect: a mean over two was told as n = 3 where the third had diverged."""
    losses = {0: 0.2, 1: None, 2: 0.3}
    results = [
        result(
            seed, top1=None if loss is None else 0.7, loss=loss, seed=seed, status="diverged" if not loss else "done"
        )
        for seed, loss in losses.items()
    ]
    (row,) = best_table(read_study(write_study(tmp_path / "study", results))).rows
    assert row[3] == "46.67 (0.00 … 70.00, n = 3)"
    assert row[5] == "0.2500 (0.2000 … 0.3000, n = 2 of 3)"


def test_a_study_without_results_says_so(tmp_path):
    folder = write_study(tmp_path / "study", [result(0)])
    (folder / "results" / "00000.json").unlink()
    with pytest.raises(InputError, match="no trial has finished yet"):
        read_study(folder)


def test_the_time_to_sgds_accuracy_is_told_beside_sgds_whole_run(tmp_path):
    slow, fast = curve_of(0.7, 8, 10, 2.0), curve_of(0.9, 8, 10, 3.0)
    results = [
        result(0, "sgd", top1=0.7, curve=slow, epochs=8.0, seconds=16.0),
        result(1, "kfac", top1=0.9, curve=fast, epochs=8.0, seconds=24.0),
        result(2, "muon", top1=0.6),
    ]
    first = next(point for point in fast if point["test_top1"] >= 0.7)
    epochs = int(first["epoch"])
    rows = {row[2]: row[3:] for row in time_table(read_study(write_study(tmp_path / "study", results)), "sgd").rows}
    times = [f"{epochs}.0 ({epochs / 8:.2f} ×)", f"{10 * epochs}", f"{3 * epochs}.0 ({3 * epochs / 16:.2f} ×)"]
    assert rows["kfac"] == ["70.00", *times, *times]
    assert rows["sgd"][1:4] == ["8.0 (1.00 ×)", "80", "16.0 (1.00 ×)"]
    assert rows["muon"][1:4] == ["not reached", "–", "–"]


def test_three_equal_runs_reach_their_mean(tmp_path):
    """Defect: the mean of three times 0.1 is a little more than 0.1."""
    results = [result(seed, "sgd", top1=0.1, seed=seed) for seed in range(3)]
    (row,) = time_table(read_study(write_study(tmp_path / "study", results)), "sgd").rows
    assert row[4] == "4.0 (1.00 ×)"


def test_of_configurations_that_need_equal_epochs_the_quicker_is_the_fastest(tmp_path):
    """Defect: the first of the grid was, and its seconds were told."""
    results = [result(0, "sgd", top1=0.5)]
    for index, seconds in ((1, 5.0), (2, 1.0), (3, 3.0)):
        curve = curve_of(0.8, 4, 10, seconds)
        results.append(result(index, parameters=parameters(0.1 * index), top1=0.8, curve=curve))
    diverged = {"status": "diverged", "curve": curve_of(0.9, 8, 1, 0.1)}
    results.append(result(4, parameters=parameters(0.9), top1=None, **diverged))
    study = read_study(write_study(tmp_path / "study", results))
    assert fastest_to(study.grid(CELL), 0.5).seconds == 2

"""Pages of runs and studies that have next to nothing to show, or nothing good. Warnings are errors here."""

import json

import pytest
import yaml

from kfac_dist.report.card_page import report_run
from kfac_dist.report.groups import read_groups
from kfac_dist.report.pair_page import report_pair
from kfac_dist.report.study_page import report_study
from tests.unit.report.synthetic_run import write_run
from tests.unit.report.synthetic_study import result, write_study

RATES = (0.1, 0.2)
NOTHING = {"curve": [], "final": {"train_loss": None, "test_top1": None}, "best_test_top1": None}


def diverged(index, size):
    parameters = {"learning_rate": RATES[index % 2], "damping": 0.1}
    reached = {"train_loss<=0.5": None}
    return result(index, "kfac", size, parameters, None, status="diverged", iterations_to=reached, **NOTHING)


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([result(0)], "70.00"),
        ([diverged(0, 128), diverged(1, 128)], "not reached"),
        ([diverged(0, 128), diverged(1, 128), result(2, "kfac", 256, top1=0.5)], "50.00"),
        ([result(0, status="failed", error="no memory", **NOTHING)], "1 trials failed and count nowhere, and"),
        ([result(0, parameters={"width": 2.0}), result(1, "sgd", top1=None, loss=None, seconds=None)], "width 2"),
    ],
)
def test_a_study_of_little(tmp_path, results, says):
    page, _, _ = report_study(write_study(tmp_path / "study", results))
    assert says in page.read_text()


def test_a_grid_without_a_learning_rate_has_no_shares(tmp_path):
    results = [result(index, parameters={"interval": float(interval)}) for index, interval in enumerate((1, 5))]
    definition = {"recipe": {"weight_rescaling": "off"}}
    page, *_ = report_study(write_study(tmp_path / "study", results, definition=definition))
    assert ">nan<" not in page.read_text()
    assert page.with_suffix(".csv").read_text().splitlines()[1].split(",")[5] == "1"
    assert "weight_rescaling: off" in page.with_suffix(".md").read_text()


def rewrite(folder, change):
    path = folder / "metrics.jsonl"
    records = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records if record))
    return folder


def test_the_first_iteration_of_a_run_that_told_less(tmp_path):
    folder = write_run(tmp_path / "run")
    names = ("kind", "iteration", "epoch", "loss")
    rewrite(folder, lambda record: {name: record[name] for name in names} if record.get("iteration") == 0 else None)
    (folder / "DONE").unlink()
    text = report_run(folder)[0].read_text()
    assert "This run is not finished" in text
    assert "Eigenvalues were not recorded: train with kfac.monitor.spectrum=true." in text
    assert "Refreshes were not recorded: train with kfac.monitor.diff=true." in text


def test_a_run_in_which_everything_is_zero(tmp_path):
    zero = ("loss", "learning_rate", "momentum", "damping", "smallest_eigenvalue", "largest_eigenvalue", "diff")
    folder = rewrite(write_run(tmp_path / "run"), lambda record: record | {n: 0.0 for n in zero if n in record})
    assert "Damping went from 0 to 0" in report_run(folder)[0].read_text()


def test_a_run_that_diverged(tmp_path):
    folder = rewrite(write_run(tmp_path / "run", "sgd"), lambda record: record | {"loss": "NaN"})
    text = report_run(folder)[0].read_text()
    assert "Curvature" not in text
    assert "87.50 %" in text


@pytest.mark.parametrize(("fraction", "told"), [(None, False), (1.0, False), (0.0625, True)])
def test_a_card_tells_of_a_part_of_the_samples(tmp_path, fraction, told):
    run = write_run(tmp_path / "run")
    if fraction is not None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["kfac"]["sample_fraction"] = fraction
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = report_run(run)[0].with_suffix(".md").read_text()
    assert "Refresh: interval 1, schedule every." in text
    assert ("A and G: from the first 6.25 % of each slot's samples." in text) is told


def test_on_a_phone_labels_wrap_so_that_numbers_are_seen(tmp_path):
    page = report_run(write_run(tmp_path / "run"))[0].read_text()
    assert "@media (max-width: 30rem) { td:not(.number) { white-space: normal; } }" in page


def pair_of(tmp_path, groups):
    """The text of a comparison of groups of runs, given as a command line has them."""
    report_pair(
        read_groups([f"{label}={tmp_path / glob}" for label, glob in groups.items()], None, None),
        tmp_path / "pair.html",
    )
    return (tmp_path / "pair.md").read_text()


def test_a_pair_says_what_all_runs_have_alike(tmp_path):
    """Defect: neither the data nor the model nor the batch size stood on the page."""
    write_run(tmp_path / "kfac")
    write_run(tmp_path / "sgd", "sgd")
    text = pair_of(tmp_path, {"A": "kfac", "B": "sgd"})
    assert "All with data.name digits, model.name digits_cnn, batch.global_size 64.\n" in text
    assert "not finished" not in text


def test_a_pair_says_which_runs_are_unlike_and_unfinished(tmp_path):
    """Defect: means and intervals over runs of two batch sizes, one of which was stopped, without a word."""
    for seed in (0, 1):
        write_run(tmp_path / f"kfac{seed}", seed=seed)
        write_run(tmp_path / f"sgd{seed}", "sgd", seed=seed)
    (tmp_path / "kfac1" / "DONE").unlink()
    metrics = tmp_path / "kfac1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"images_per_second": 1000.0', '"images_per_second": 500.0'))
    config = tmp_path / "kfac1" / "config.yaml"
    config.write_text(config.read_text().replace("global_size: 64", "global_size: 128"))
    text = pair_of(tmp_path, {"A": "kfac*", "B": "sgd*"})
    assert "A: not finished: kfac1. The last evaluation so far is taken for the end." in text
    assert "A: its runs differ not only by their seed, but in batch.global_size." in text
    assert "batch.global_size 64" not in text
    assert "s an iteration" not in text, "unlike runs may differ in speed"


def test_disturbed_seconds_are_told(tmp_path):
    """Defect: seconds of a run that had half a core were compared as any others, in pairs and in studies."""
    for seed in (0, 1):
        write_run(tmp_path / f"kfac{seed}", seed=seed)
        write_run(tmp_path / f"sgd{seed}", "sgd", seed=seed)
    groups = {"A": "kfac*", "B": "sgd*"}
    assert "do not compare seconds" not in pair_of(tmp_path, groups)
    metrics = tmp_path / "sgd1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"images_per_second": 1000.0', '"images_per_second": 500.0'))
    assert "do not compare seconds" in pair_of(tmp_path, groups)


def test_whole_runs_are_the_baseline_s_mean_over_seeds(tmp_path):
    """Defect: means over seeds were divided by the first seed's: 1.00 times the epochs, 1.50 the seconds."""
    points = [{"iteration": 10, "epoch": 1.0, "train_loss": 0.1, "test_loss": 0.1, "test_top1": 0.7}]
    runs = [
        result(seed, "sgd", seed=seed, seconds=seconds, curve=[{**points[0], "seconds": seconds}], epochs=1.0)
        for seed, seconds in ((0, 1.0), (1, 2.0))
    ]
    report_study(write_study(tmp_path / "study", runs))
    text = (tmp_path / "study" / "report.md").read_text()
    assert "| 1.0 (1.00 ×) | 10 | 1.5 (1.00 ×) |" in text
    assert "s an iteration, 0.1 to 0.2 (net, batch 128, sgd). Something else used the machine" in text

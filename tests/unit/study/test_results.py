"""Results from metrics, targets, the best of several, and the filter of a command."""

from pathlib import Path
from typing import Any

import pytest

from kfac_dist.errors import InputError, TrainingDiverged
from kfac_dist.study.definition import Target, load_study
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.results import best_of, summarise
from kfac_dist.study.status import describe_status, select
from kfac_dist.study.trial_run import ClaimLost, EarlyDivergence
from kfac_dist.study.trials import Trial
from kfac_dist.study.worker import _is_ready
from tests.unit.study.studies import write_study

LOSS, TOP1 = Target(metric="train_loss", value=0.5), Target(metric="test_top1", value=0.75)


def metrics(losses: list[Any], top1: list[float], per_evaluation: int) -> list[dict[str, Any]]:
    """Of a run of 10 images a second, 100 images an epoch, batch 10."""
    records: list[dict[str, Any]] = []
    for number, loss in enumerate(losses):
        epoch = (number + 1) / 10
        records.append({"kind": "train", "iteration": number, "epoch": epoch, "loss": loss, "images_per_second": 5.0})
        if (number + 1) % per_evaluation == 0:
            accuracy = top1[(number + 1) // per_evaluation - 1]
            records.append({"kind": "eval", "iteration": number, "epoch": epoch, "loss": 1.5, "top1": accuracy})
    return [*records, {"kind": "summary"}]


def test_a_summary() -> None:
    records = metrics([4.0, 2.0, 1.0, 0.2, 0.7, 0.1], [70.0, 80.0, 75.0], per_evaluation=2)
    summary = summarise(records, 10, [LOSS, TOP1, Target(metric="train_loss", value=0.01)])
    assert (summary["iterations"], summary["epochs"], summary["seconds"]) == (6, 0.6, 12.0)
    assert [point["iteration"] for point in summary["curve"]] == [2, 4, 6]
    assert [point["train_loss"] for point in summary["curve"]] == pytest.approx([3.0, 0.6, 0.4])
    assert [point["seconds"] for point in summary["curve"]] == [4.0, 8.0, 12.0]
    assert [point["test_top1"] for point in summary["curve"]] == [0.7, 0.8, 0.75]
    assert summary["final"] == {"train_loss": pytest.approx(0.4), "test_top1": 0.75}
    assert summary["best_test_top1"] == 0.8
    # a fifth of an epoch is 2 iterations: 0.2 and 0.7 are 0.45
    assert summary["iterations_to"] == {"train_loss<=0.5": 5, "test_top1>=0.75": 4, "train_loss<=0.01": None}


def test_a_summary_of_what_is_not_finite() -> None:
    summary = summarise(metrics([2.0, "NaN"], [10.0], per_evaluation=2), 10, [LOSS])
    assert summary["final"] == {"train_loss": None, "test_top1": 0.1}
    assert summary["iterations_to"] == {"train_loss<=0.5": None}
    nothing = summarise([], 10, [LOSS])
    assert (nothing["iterations"], nothing["curve"], nothing["best_test_top1"]) == (0, [], None)


def test_the_best() -> None:
    def result(status: str, loss: float | None, top1: float | None) -> dict[str, Any]:
        return {"status": status, "final": {"train_loss": loss, "test_top1": top1}}

    results = [
        result("done", 1.0, 0.5),
        result("diverged", 0.1, 0.9),
        result("done", 0.7, 0.5),
        result("done", None, 0.1),
    ]
    assert best_of(results, "test_top1") is results[0]
    assert best_of(results, "train_loss") is results[2]
    assert best_of([results[1]], "test_top1") is None


def trial(index: int, optimizer: str, batch_size: int) -> Trial:
    return Trial(index, "net", optimizer, batch_size, 0, {}, {}, None)


def test_filters() -> None:
    trials = [
        trial(n, name, size) for n, (name, size) in enumerate((a, b) for a in ("sgd", "kfac") for b in (128, 256))
    ]
    assert select(trials, None) == trials
    assert [t.index for t in select(trials, "optimizer=kfac")] == [2, 3]
    assert [t.index for t in select(trials, "batch_size=256, optimizer=kfac|sgd")] == [1, 3]
    assert [t.index for t in select(trials, "index=1-2")] == [1, 2]
    for wrong in ("optimizer", "size=3", "optimizer=adam", "optimizer=kfac|adam", "index=1-2|7"):
        with pytest.raises(InputError, match="--only"):
            select(trials, wrong)


def test_hopeless_trials_end_early() -> None:
    check = EarlyDivergence(10, per_epoch=2, is_lost=lambda: False)
    for iteration, loss in enumerate([2.3, 50.0, 50.0, 50.0]):  # 5 iterations are looked at, at least
        check.see(loss, iteration, 0.0, gave_up=False)
    with pytest.raises(TrainingDiverged):
        check.see(50.0, 4, 0.0, gave_up=False)
    longer = EarlyDivergence(10, per_epoch=100, is_lost=lambda: False)
    for iteration in range(99):
        longer.see(50.0 if iteration else 2.3, iteration, 0.0, gave_up=False)


def test_a_lost_trial_ends() -> None:
    with pytest.raises(ClaimLost):
        EarlyDivergence(10, per_epoch=2, is_lost=lambda: True).see(1.0, 0, 0.0, gave_up=False)


def test_more_seeds_wait_for_failed_trials(tmp_path: Path) -> None:
    """After a retry another configuration might be the best."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path, {"best": {"seeds": [1]}})))
    _, trials = folder.read_plan()
    for second, is_ready in (("failed", False), ("diverged", True), ("done", True)):
        folder.write_result(0, {"index": 0, "status": "done"})
        assert not _is_ready(trials[2], {0}, folder)
        folder.write_result(1, {"index": 1, "status": second})
        assert _is_ready(trials[2], {0, 1}, folder) == is_ready


def test_an_error_of_many_trials_is_told_once(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    trials = folder.write_plan(load_study(write_study(tmp_path)))
    for index, error in enumerate(["no data", "no data", "no memory", "no data"]):
        folder.write_result(index, {"index": index, "status": "failed", "error": error, "seconds": 0.0})
    assert describe_status(folder, trials, 60.0)[-2:] == [
        "trial 0 failed: no data (and 2 more with this error, up to trial 3)",
        "trial 2 failed: no memory",
    ]

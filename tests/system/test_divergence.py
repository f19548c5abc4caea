"""Training that diverges: exit code 3, one message, and no DONE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.errors import TrainingFailed
from kfac_dist.training.divergence import DivergenceCheck
from tests.paths import ROOT


def test_divergence_of_sgd(command: Callable[..., Any], tmp_path: Path) -> None:
    overrides = ["optimizer.name=sgd", "kfac=null", "weight_rescaling=off", "optimizer.learning_rate=1.0e+30"]
    finished = command(ROOT / "configs" / "quickstart.yaml", *overrides, f"run.output_dir={tmp_path}")
    assert finished.code == 3
    assert finished.err.count("training failed: the training loss is nan at iteration 3 ") == 1
    assert finished.out == ""
    run = tmp_path / "quickstart"
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert '"kind": "event", "iteration": 3, "event": "nonfinite"' in last
    assert not (run / "DONE").exists()


def test_a_finite_but_hopeless_loss(command: Callable[..., Any], tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1.0e+4", "train.epochs=2", "weight_rescaling=off"]
    finished = command(ROOT / "configs" / "quickstart.yaml", *overrides, f"run.output_dir={tmp_path}")
    assert finished.code == 3
    assert finished.err.count("training failed: the mean training loss of the last epoch is ") == 1
    assert "where guessing gives 2.303" in finished.err
    assert "Lower optimizer.learning_rate" in finished.err
    run = tmp_path / "quickstart"
    records = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"kind": "train"' in line for line in records) == 23  # to the end
    assert sum('"kind": "eval"' in line for line in records) == 2
    assert not (run / "DONE").exists()


@pytest.mark.parametrize(
    ("losses", "is_hopeless"),
    [
        ([2.5, 2.3, 2.3], False),  # learned nothing, but guesses
        ([2.3, 900.0, 900.0, 1.0, 1.0], False),  # recovered: the last two are an epoch
        ([2.3, 1.0, 1.0, 6.8, 6.8], False),
        ([2.3, 1.0, 1.0, 7.0, 7.0], True),
        ([40.0, 90.0, 90.0], False),  # began badly
        ([40.0, 130.0, 130.0], True),
        ([900.0], False),
    ],
)
def test_the_rule(losses: list[float], is_hopeless: bool) -> None:
    check = DivergenceCheck(num_classes=10, per_epoch=2)
    for loss in losses:
        check.see(loss, 0, 0.5, gave_up=False)
    check.see(float("inf"), 9, 4.5, gave_up=False)  # counts for nothing
    if is_hopeless:
        with pytest.raises(TrainingFailed, match=f"last epoch is {losses[-1]:.4g}, where guessing gives 2.303"):
            check.check_end()
    else:
        check.check_end()


def test_a_batch_larger_than_the_training_set_is_told(
    command: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    told = "batch.global_size = 1,536 is more than the 1,438 training images"
    overrides = ["batch.global_size=1536", "train.epochs=1.2", f"run.output_dir={tmp_path}"]
    assert command(config, *overrides).code == 0
    assert [record.levelname for record in caplog.records if told in record.getMessage()] == ["WARNING"]
    explained = command(config, *overrides, "--explain").out
    assert f"warning: {told}" in explained
    assert "warning" not in command(config, "--explain").out

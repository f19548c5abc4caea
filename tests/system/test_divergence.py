"""Training that diverges: exit code 3, one message, and no DONE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.paths import ROOT


def test_divergence_of_sgd(command: Callable[..., Any], tmp_path: Path) -> None:
    overrides = ["optimizer.name=sgd", "kfac=null", "weight_rescaling=off", "optimizer.learning_rate=1.0e+30"]
    finished = command(ROOT / "configs" / "quickstart.yaml", *overrides, f"run.output_dir={tmp_path}")
    assert finished.code == 3
    assert finished.err.count("training failed: the training loss is nan at iteration 1 ") == 1
    assert finished.out == ""
    run = tmp_path / "quickstart"
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert '"kind": "train", "iteration": 1,' in last
    assert '"loss": "NaN"' in last
    assert not (run / "DONE").exists()

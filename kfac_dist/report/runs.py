"""A run's folder as the report needs it: settings, environment, metrics, and the curve of its evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.config.dotted import value_at
from kfac_dist.plots.runs import read_config
from kfac_dist.report.curve import Curve, number
from kfac_dist.runs.reader import read_metrics
from kfac_dist.runs.writer import DONE_FILE


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds.

    Attributes:
        name: Of the folder.
        config: config.yaml; empty where there is none.
        environment: environment.json; likewise.
        records: Kind → lines of metrics.jsonl of that kind.
        is_finished: Whether there is a DONE.
        curve: A point for each evaluation, as a study's results have it.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: Mapping[str, Sequence[Mapping[str, Any]]]
    is_finished: bool
    curve: Curve

    @property
    def summary(self) -> Mapping[str, Any]:
        """Of a finished run; empty otherwise."""
        return self.records["summary"][-1] if self.records.get("summary") else {}

    def setting(self, key: str) -> Any:
        """A dotted key of the configuration; None where it is missing."""
        return value_at(self.config, key)

    @property
    def optimizer(self) -> str:
        """Its name; "run" where that is not known."""
        return str(self.setting("optimizer.name") or "run")


def read_run_record(folder: str | Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        InputError: If it has no readable metrics.jsonl.
    """
    folder = Path(folder)
    records: dict[str, list[Mapping[str, Any]]] = {}
    lines = read_metrics(folder)
    for line in lines:
        records.setdefault(str(line.get("kind")), []).append(line)
    config = read_config(folder)
    batch_size = number((config.get("batch") or {}).get("global_size"))
    return RunRecord(
        name=folder.resolve().name,
        config=config,
        environment=_read_environment(folder),
        records=records,
        is_finished=(folder / DONE_FILE).exists(),
        curve=Curve.from_points(_points(lines, batch_size)),
    )


def _points(lines: Sequence[Mapping[str, Any]], batch_size: float) -> list[dict[str, float]]:
    """A point for each evaluation; its training loss is the mean since the evaluation before."""
    points = []
    seconds = 0.0
    losses: list[float] = []
    for line in lines:
        if line.get("kind") == "train":
            losses.append(number(line.get("loss")))
            rate = number(line.get("images_per_second"))
            seconds += batch_size / rate if rate else float("nan")
        elif line.get("kind") == "eval":
            points.append(
                {
                    "iteration": number(line.get("iteration")) + 1,
                    "epoch": number(line.get("epoch")),
                    "seconds": seconds,
                    "train_loss": sum(losses) / len(losses) if losses else float("nan"),
                    "test_loss": number(line.get("loss")),
                    "test_top1": number(line.get("top1")) / 100,
                }
            )
            losses = []
    return points


def _read_environment(folder: Path) -> dict[str, Any]:
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a run copied without it still has a card
    return environment if isinstance(environment, dict) else {}

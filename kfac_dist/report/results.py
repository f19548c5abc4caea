"""A study's folder as its report needs it: the plan, and those results that are there.

The folder holds study.yaml, manifest.jsonl (a line for each planned trial) and results/NNNNN.json (one for each
finished trial); see `kfac_dist.study`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kfac_dist.config import strict_yaml
from kfac_dist.errors import InputError
from kfac_dist.report.curve import Axis, Curve, number

T = TypeVar("T")

_COUNTED = ("done", "diverged")  # a failed trial says nothing about its configuration


class Cell(NamedTuple):
    """Where configurations compete."""

    model: str
    batch_size: int
    optimizer: str


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Attributes:
        index: Its line in the manifest.
        cell: Model, global batch size, and the study's label of the optimizer.
        seed: Of the run.
        parameters: Its place in the grid.
        status: done, diverged or failed.
        epochs: Length of the run.
        iterations: Likewise, in updates.
        seconds: Of training.
        cpu_seconds: Likewise, of the processor: of all threads.
        curve: Its evaluations.
        train_loss: Of the last part of the run; not a number where unknown.
        test_top1: At the end, a fraction; 0 for a diverged trial.
        best_test_top1: Highest of all evaluations, a fraction; not a number where there was none.
        iterations_to: Updates to each target; None where it was not reached, and for a diverged trial.
        error: What went wrong.
        environment: Versions and machine.
    """

    index: int
    cell: Cell
    seed: int
    parameters: Mapping[str, float]
    status: str
    epochs: float
    iterations: int
    seconds: float
    cpu_seconds: float
    curve: Curve
    train_loss: float
    test_top1: float
    best_test_top1: float
    iterations_to: Mapping[str, int | None]
    error: str | None
    environment: Mapping[str, Any]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Trial":
        """A trial from its result.

        Raises:
            KeyError, TypeError, ValueError: If the result is not of the form it should have.
        """
        diverged = record["status"] == "diverged"
        final = record.get("final") or {}
        top1 = number(final.get("test_top1"))
        return cls(
            index=int(record["index"]),
            cell=Cell(str(record["model"]), int(record["batch_size"]), str(record["optimizer"])),
            seed=int(record["seed"]),
            parameters={str(name): float(value) for name, value in (record["parameters"] or {}).items()},
            status=str(record["status"]),
            epochs=number(record.get("epochs")),
            iterations=int(record.get("iterations") or 0),
            seconds=number(record.get("seconds")),
            cpu_seconds=number(record.get("cpu_seconds")),
            curve=Curve.from_points(record.get("curve") or ()),
            train_loss=float("nan") if diverged else number(final.get("train_loss")),
            test_top1=0.0 if diverged else top1,
            best_test_top1=number(record.get("best_test_top1")),
            iterations_to={
                str(name): None if diverged else iterations
                for name, iterations in (record.get("iterations_to") or {}).items()
            },
            error=record.get("error"),
            environment=dict(record.get("environment") or {}),
        )

    @property
    def is_done(self) -> bool:
        """Whether it came to its end."""
        return self.status == "done"


@dataclass(frozen=True)
class Study:
    """A study's plan and its results so far.

    Attributes:
        name: Of the study.
        definition: study.yaml.
        trials: Results, in the manifest's order.
        plan: Index → what the manifest says of that trial.
        kinds: The study's label of each optimizer → its `optimizer.name`; in the study's order.
    """

    name: str
    definition: Mapping[str, Any]
    trials: Sequence[Trial]
    plan: Mapping[int, Mapping[str, Any]]
    kinds: Mapping[str, str]

    @property
    def data(self) -> str:
        """Name of the data set; empty where the definition does not tell."""
        recipe = self.definition.get("recipe")
        data = recipe.get("data") if isinstance(recipe, dict) else None
        return str(data.get("name", "")) if isinstance(data, dict) else ""

    @property
    def fixed_budget(self) -> tuple[Axis, float] | None:
        """The epochs or iterations that all trials have alike; None where the budget's rule is another."""
        budget = self.definition.get("budget")
        budget = budget if isinstance(budget, dict) else {}
        axes: tuple[Axis, Axis] = ("epoch", "iteration")
        return next(
            ((axis, number(budget.get(f"{axis}s"))) for axis in axes if budget.get("rule") == f"fixed_{axis}s"), None
        )

    @property
    def models(self) -> list[str]:
        """Those that have results, in the plan's order."""
        return list(dict.fromkeys(trial.cell.model for trial in self.trials))

    @property
    def batch_sizes(self) -> list[int]:
        """Those that have results, ascending."""
        return sorted({trial.cell.batch_size for trial in self.trials})

    @property
    def targets(self) -> list[str]:
        """Names of the targets, in the results' order."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.iterations_to))

    @cached_property
    def grid_seed(self) -> int:
        """The seed that whole grids were run with, and that the best are chosen by: the study's first.

        Where that is not told or has no result, the one of most trials, the smaller of equals.
        """
        seeds = self.definition.get("seeds")
        counts = Counter(trial.seed for trial in self.trials)
        if isinstance(seeds, list) and seeds and seeds[0] in counts:
            return int(seeds[0])
        return min(counts, key=lambda seed: (-counts[seed], seed))

    @cached_property
    def _by_cell(self) -> dict[Cell, list[Trial]]:
        found: dict[Cell, list[Trial]] = {}
        for trial in self.trials:
            if trial.status in _COUNTED:
                found.setdefault(trial.cell, []).append(trial)
        return found

    @cached_property
    def missing(self) -> frozenset[int]:
        """Indices of planned trials that have no result."""
        return frozenset(self.plan) - {trial.index for trial in self.trials}

    def seeds_of(self, cell: Cell) -> list[Trial]:
        """The trials of a cell that tell something about their configurations, with all seeds."""
        return self._by_cell.get(cell, [])

    def grid(self, cell: Cell) -> list[Trial]:
        """The trials of a cell's grid: those with the grid's seed."""
        return [trial for trial in self.seeds_of(cell) if trial.seed == self.grid_seed]

    def is_complete(self, cell: Cell) -> bool:
        """Whether every planned trial of the cell has a result and none failed, which a retry could make the best.

        A line of the plan that does not tell its cell may be of any.
        """
        failed = any(trial.cell == cell and trial.status not in _COUNTED for trial in self.trials)
        return not failed and not any(_may_be_of(self.plan[index], cell) for index in self.missing)

    def first_of_kind(self, kind: str) -> str | None:
        """The first optimizer of this name; None if there is none."""
        return next((label for label, name in self.kinds.items() if name == kind), None)


def read_study(folder: str | Path) -> Study:
    """Read what a study's folder holds so far.

    Raises:
        InputError: If it holds no study, no result yet, or a file that cannot be read.
    """
    folder = Path(folder)
    definition = _read(folder / "study.yaml", _load_mapping)
    lines = _read(folder / "manifest.jsonl", lambda text: [json.loads(line) for line in text.splitlines() if line])
    plan = {int(line["index"]): line for line in lines}
    trials = _read_trials(sorted((folder / "results").glob("*.json")))
    if not trials:
        raise InputError(f"{folder}: no trial has finished yet; report it when results/ holds a result")
    labels = list(dict.fromkeys([*(definition.get("optimizers") or {}), *(trial.cell.optimizer for trial in trials)]))
    kinds = {label: _kind(label, definition, plan) for label in labels}
    name = str(definition.get("name") or folder.resolve().name)
    return Study(name, definition, trials, plan, kinds)


def _read_trials(paths: Sequence[Path]) -> list[Trial]:
    """In the manifest's order; of damaged results all are named at once."""
    trials, damaged = [], []
    for path in paths:
        try:
            trials.append(_read(path, partial(_parse_trial, path)))
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("\n".join(damaged))
    return sorted(trials, key=lambda trial: trial.index)


def _parse_trial(path: Path, text: str) -> Trial:
    trial = Trial.from_json(json.loads(text))
    if path.stem != f"{trial.index:05}":
        raise ValueError(f"it is the result of trial {trial.index}")
    return trial


def _read(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the folder of a study") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        of_trial = path.parent.name == "results"
        remedy = "delete it and run its trial again" if of_trial else "plan the study in another folder"
        raise InputError(f"{path}: is not what a study writes ({type(error).__name__}: {error}); {remedy}") from error


def _load_mapping(text: str) -> dict[str, Any]:
    value = strict_yaml.parse(text, "study.yaml")  # in which "off" is a word
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    return value


def _may_be_of(line: Mapping[str, Any], cell: Cell) -> bool:
    told = (line.get("model"), line.get("batch_size"), line.get("optimizer"))
    return all(value is None or value == mine for value, mine in zip(told, cell, strict=True))


def _kind(label: str, definition: Mapping[str, Any], plan: Mapping[int, Mapping[str, Any]]) -> str:
    """The optimizer's name in its configurations; else in the definition; else what its label begins with."""
    for line in plan.values():
        config = line.get("config") or line.get("configuration")
        if line.get("optimizer") == label and isinstance(config, dict) and isinstance(config.get("optimizer"), dict):
            return str(config["optimizer"].get("name", label))
    column = (definition.get("optimizers") or {}).get(label)
    settings = column.get("settings") if isinstance(column, dict) else None
    if isinstance(settings, dict):
        section = settings.get("optimizer")
        name = settings.get("optimizer.name") or (section.get("name") if isinstance(section, dict) else None)
        if name:
            return str(name)
    return label.replace("_", "-").split("-")[0].lower()

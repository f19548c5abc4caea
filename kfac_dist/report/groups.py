"""Groups of runs that differ by their seed: from folders, or the best configurations of a study."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kfac_dist.config.dotted import leaves
from kfac_dist.errors import InputError
from kfac_dist.report.best import best_of
from kfac_dist.report.curve import Curve
from kfac_dist.report.results import Cell, Study, read_study
from kfac_dist.report.runs import read_run_record

T = TypeVar("T")

_OWN_KEYS = ("run.name", "run.seed", "run.output_dir")


@dataclass(frozen=True)
class Group:
    """Runs of the same settings.

    Attributes:
        label: In legends and tables.
        kind: The optimizer's name.
        curves: One for each run.
        seeds: Of the runs.
        settings: Dotted key → value, where all its runs agree.
        tuning: How its settings were chosen; empty where that is not known.
        unfinished: Names of runs that have not come to their end.
        differing: Keys in which its runs differ besides their seed.
    """

    label: str
    kind: str
    curves: Sequence[Curve]
    seeds: Sequence[int]
    settings: Mapping[str, str] = field(default_factory=dict)
    tuning: str = ""
    unfinished: Sequence[str] = ()
    differing: Sequence[str] = ()


def read_groups(texts: Sequence[str], model: str | None, batch_size: int | None) -> list[Group]:
    """The groups of a command line.

    Args:
        texts: ``[LABEL=]PATTERN`` with a run's folder or a glob of several, or ``[LABEL=]STUDY:OPTIMIZER``, the best
            configuration of a study's optimizer with all its seeds.
        model: Of the studies; may be left out where they have one.
        batch_size: Likewise.

    Raises:
        InputError: If a text names no run, or labels coincide.
    """
    studies: dict[str, Study] = {}
    groups = []
    for text in texts:
        label, equals, pattern = text.partition("=")
        if not equals:
            label, pattern = "", text
        folder, colon, optimizer = pattern.rpartition(":")
        if colon and (Path(folder) / "manifest.jsonl").exists():
            if folder not in studies:
                studies[folder] = read_study(folder)
            group = _from_study(studies[folder], optimizer, label or optimizer, model, batch_size)
        else:
            group = _from_folders(pattern, label)
        groups.append(group)
    labels = [group.label for group in groups]
    if len(set(labels)) < len(labels):
        raise InputError(f"labels of groups must differ, got {', '.join(labels)}: give LABEL=GROUP")
    return groups


def _from_folders(pattern: str, label: str) -> Group:
    folders = [Path(path) for path in sorted(glob.glob(pattern)) if (Path(path) / "metrics.jsonl").exists()]
    if not folders:
        raise InputError(f"{pattern}: no run's folder there (with metrics.jsonl); give a folder, a glob or STUDY:LABEL")
    runs = [read_run_record(folder) for folder in folders]
    empty = [folder for folder, run in zip(folders, runs, strict=True) if not run.curve.epoch.size]
    if empty:
        raise InputError(f"{empty[0]}: no evaluation is recorded yet; leave it out until there is one")
    settings = [{key: str(value) for key, value in leaves(run.config).items()} for run in runs]
    values = {key: {one.get(key) for one in settings} for one in settings for key in one if key not in _OWN_KEYS}
    return Group(
        label or pattern,
        runs[0].optimizer,
        [run.curve for run in runs],
        [int(run.setting("run.seed") or 0) for run in runs],
        {key: settings[0][key] for key, found in values.items() if len(found) == 1},
        unfinished=[run.name for run in runs if not run.is_finished],
        differing=[key for key, found in values.items() if len(found) > 1],
    )


def _from_study(study: Study, optimizer: str, label: str, model: str | None, batch_size: int | None) -> Group:
    if optimizer not in study.kinds:
        raise InputError(f"{study.name}: has no optimizer {optimizer!r}, it has {', '.join(study.kinds)}")
    model = model or _only(study.models, "--model")
    batch_size = batch_size or _only(study.batch_sizes, "--batch-size")
    cell = Cell(model, batch_size, optimizer)
    best = best_of(study, cell)
    if best is None:
        raise InputError(
            f"{study.name}: must have a finished trial of optimizer {optimizer} on {model} at batch {batch_size}; "
            f"it has {', '.join(study.kinds)} on {', '.join(study.models)} at {', '.join(map(str, study.batch_sizes))}"
        )
    if diverged := [str(trial.seed) for trial in best.trials if not trial.is_done]:
        raise InputError(
            f"{study.name}: the best configuration of {optimizer} at batch {batch_size} diverged with seed "
            f"{', '.join(diverged)}, and a mean over its curves would hide that: see the study's own page"
        )
    return Group(
        label,
        study.kinds[optimizer],
        best.curves,
        [trial.seed for trial in best.trials],
        {
            **({"data.name": study.data} if study.data else {}),
            "model.name": model,
            "batch.global_size": str(batch_size),
            **{name: f"{value:g}" for name, value in best.chosen.parameters.items()},
        },
        f"best of {len(study.grid(cell))} configurations by final test accuracy",
    )


def _only(values: Sequence[T], option: str) -> T:
    if len(values) != 1:
        raise InputError(f"{option} must be given, one of {', '.join(map(str, values))}: the study has several")
    return values[0]

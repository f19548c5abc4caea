"""A study's folder: the manifest, written once, and where trials and results lie.

FOLDER/study.yaml            the study, its recipe included
FOLDER/manifest.jsonl        a line for each trial, its configuration in full
FOLDER/trials/NNNNN/         claims, and the run's folder while it trains
FOLDER/results/NNNNN.json    what came of it; its being there says that the trial is finished
FOLDER/workers/              what workers had to say
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kfac_dist.config import strict_yaml
from kfac_dist.config.dotted import leaves
from kfac_dist.config.load import with_defaults
from kfac_dist.errors import InputError
from kfac_dist.runs.reader import METRICS_FILE
from kfac_dist.study.definition import Study
from kfac_dist.study.trials import Trial, plan_trials

STUDY_FILE = "study.yaml"
MANIFEST_FILE = "manifest.jsonl"


class StudyFolder:
    """The places in a study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def trial(self, index: int) -> Path:
        """Of a trial's claims and its run."""
        return self.path / "trials" / f"{index:05}"

    def result(self, index: int) -> Path:
        """Of a finished trial."""
        return self.path / "results" / f"{index:05}.json"

    @property
    def workers(self) -> Path:
        """Of the workers' logs."""
        return self.path / "workers"

    def finished(self) -> set[int]:
        """Indices of the trials that have a result."""
        try:
            names = os.listdir(self.path / "results")
        except FileNotFoundError:
            return set()
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return {int(stem) for stem in stems if stem.isdigit()}

    def read_result(self, index: int) -> dict[str, Any]:
        """What came of a finished trial.

        Raises:
            InputError: If the file is damaged.
        """
        path = self.result(index)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it, and its trial will be run again") from error
        if not isinstance(result, dict) or result.get("index") != index:
            raise InputError(f"{path}: is not the result of trial {index}; delete it, and its trial will be run again")
        return result

    def write_result(self, index: int, result: Mapping[str, Any]) -> None:
        """Write what came of a trial, whole or not at all."""
        write_atomically(self.result(index), json.dumps(result, allow_nan=False) + "\n")

    @property
    def is_planned(self) -> bool:
        """Whether it has a study's manifest."""
        return (self.path / MANIFEST_FILE).exists()

    def write_plan(self, study: Study) -> list[Trial]:
        """Plan the study, or find that it was planned before, as it is now; its trials.

        Raises:
            InputError: If the folder holds another study, naming the keys that differ, or a training run; or if it
                cannot be written.
        """
        trials = plan_trials(study)
        if (self.path / METRICS_FILE).exists():
            raise InputError(f"{self.path} holds a training run; choose another --folder")
        yaml_text = study.to_yaml()
        text = "".join(json.dumps(trial.to_dict(), allow_nan=False) + "\n" for trial in trials)
        try:
            for name in ("trials", "results", "workers"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            _create_once(self.path / STUDY_FILE, yaml_text)
            self._check_same_study(yaml_text)
            _create_once(self.path / MANIFEST_FILE, text)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); choose another --folder") from error
        self._check_same_trials(trials)
        return trials

    def read_plan(self) -> tuple[Study, list[Trial]]:
        """The study of this folder and its trials, as they were planned.

        Raises:
            InputError: If there is none.
        """
        path = self.path / MANIFEST_FILE
        try:
            study = Study.model_validate(strict_yaml.read_mapping(self.path / STUDY_FILE))
            lines = path.read_text(encoding="utf-8").splitlines()
            return study, [Trial(**json.loads(line)) for line in lines]
        except InputError as error:
            raise InputError(
                f"{self.path} holds no study ({error}); plan one: python -m kfac_dist.study plan"
            ) from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); plan the study in another folder") from error

    def _check_same_study(self, yaml_text: str) -> None:
        there = (self.path / STUDY_FILE).read_text(encoding="utf-8")
        if there != yaml_text:
            before, now = strict_yaml.parse(there, STUDY_FILE), strict_yaml.parse(yaml_text, "")
            with suppress(ValueError):  # keys that came later count as their defaults
                before = Study.model_validate(before).model_dump(mode="json")
            if before != now:
                self._refuse("study", _differences(before, now))

    def _check_same_trials(self, trials: Sequence[Trial]) -> None:
        """A study may be the same and its trials not: another version of this program has other defaults."""
        _, there = self.read_plan()
        if len(there) != len(trials):
            self._refuse("number of trials", [f"{len(there)} when it was planned, {len(trials)} now"])
        for before, now in zip(there, trials, strict=True):
            if isinstance(before.config, dict):
                before = replace(before, config=with_defaults(before.config))
            if before != now:
                self._refuse(f"trial {now.index}", _differences(before.to_dict(), now.to_dict()))

    def _refuse(self, what: str, differences: Sequence[str]) -> None:
        raise InputError(
            f"{self.path} holds another study: a study goes on only as it was planned, but its {what} differs. Give "
            "another --folder, or set these back:\n  " + "\n  ".join(differences)
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whoever else writes it."""
    temporary = _write_temporary(path, text)
    os.replace(temporary, path)


def _create_once(path: Path, text: str) -> None:
    """Write a file unless there is one; of several processes one wins, and none sees half of it."""
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _write_temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _differences(before: object, now: object) -> list[str]:
    old, new = leaves(before), leaves(now)
    return [
        f"{key}: {old.get(key, 'absent')} when it was planned, {new.get(key, 'absent')} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]

"""How far a study is, and trials that failed: which they are, and running them again."""

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence

from kfac_dist.errors import InputError
from kfac_dist.study.claims import is_claimed, release_all
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.trial_run import RUN_FOLDER
from kfac_dist.study.trials import Trial

FILTER_KEYS = ("index", "model", "optimizer", "batch_size", "seed")
_STATES = ("done", "diverged", "failed", "running", "waiting")


def select(trials: Sequence[Trial], only: str | None) -> list[Trial]:
    """The trials that a filter lets pass.

    Args:
        trials: Of the study.
        only: ``key=value`` conditions, joined by commas, all of which must hold; several values are joined by ``|``, a
            range of numbers is written ``3-17``. None lets all pass.

    Raises:
        InputError: If it is no such filter, a value means no trial, or none passes.
    """
    chosen = list(trials)
    for condition in only.split(",") if only else ():
        key, equals, wanted = condition.strip().partition("=")
        if not equals or key not in FILTER_KEYS:
            raise InputError(
                f"--only must be key=value, with a key of {', '.join(FILTER_KEYS)}, joined by commas, got {only!r}"
            )
        for text in wanted.split("|"):
            if not any(_matches(getattr(trial, key), text) for trial in trials):
                raise InputError(f"--only {only}: {key}={text} means no trial of the study's {len(trials)}")
        chosen = [trial for trial in chosen if any(_matches(getattr(trial, key), text) for text in wanted.split("|"))]
    if not chosen:
        raise InputError(f"--only {only}: no trial of the study's {len(trials)} is meant")
    return chosen


def describe_status(folder: StudyFolder, trials: Sequence[Trial], lease_seconds: float) -> list[str]:
    """A table of the trials' states, and the errors of those that failed, each error once."""
    finished = folder.finished()
    counts: dict[tuple[str, str, int], Counter[str]] = {}
    problems: dict[str, list[int]] = {}  # trials by their error: what all of them lack is told once
    seconds = 0.0
    for trial in trials:
        state = "waiting"
        if trial.index in finished:
            result = folder.read_result(trial.index)
            state, seconds = result["status"], seconds + result["seconds"]
            if state == "failed":
                problems.setdefault(result["error"], []).append(trial.index)
        elif is_claimed(folder.trial(trial.index), lease_seconds):
            state = "running"
        counts.setdefault((trial.model, trial.optimizer, trial.batch_size), Counter())[state] += 1
    header = f"{'model':14} {'optimizer':10} {'batch':>7} " + " ".join(f"{state:>8}" for state in _STATES)
    rows = [
        f"{model:14} {optimizer:10} {batch_size:>7} " + " ".join(f"{count[state]:>8}" for state in _STATES)
        for (model, optimizer, batch_size), count in counts.items()
    ]
    total = sum(counts.values(), Counter())
    done = len(trials) - total["waiting"] - total["running"]
    last = f"{done} of {len(trials)} trials are finished, {seconds:.0f} s of training"
    return [header, *rows, last, *(_describe_problem(error, indices) for error, indices in problems.items())]


def _describe_problem(error: str, indices: Sequence[int]) -> str:
    more = f" (and {len(indices) - 1} more with this error, up to trial {indices[-1]})" if len(indices) > 1 else ""
    return f"trial {indices[0]} failed: {error}{more}"


def retry(folder: StudyFolder, trials: Iterable[Trial]) -> list[int]:
    """Let failed trials be run again, from their start; which they are."""
    again = []
    for trial in trials:
        if trial.index in folder.finished() and folder.read_result(trial.index)["status"] == "failed":
            shutil.rmtree(folder.trial(trial.index) / RUN_FOLDER, ignore_errors=True)
            release_all(folder.trial(trial.index))
            folder.result(trial.index).unlink()
            again.append(trial.index)
    return again


def _matches(value: object, wanted: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if bounds and isinstance(value, int):
        return int(bounds[1]) <= value <= int(bounds[2])
    return str(value) == wanted

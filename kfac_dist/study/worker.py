"""A worker: one process that takes trials until none is left, with its imports and its data paid for once."""

import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kfac_dist.errors import InputError, RunStopped, TrainingDiverged
from kfac_dist.runs.progress import PROGRESS_VARIABLE
from kfac_dist.study.claims import Claim, Heartbeat, claim_trial, count_deaths, is_claimed
from kfac_dist.study.definition import Study
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.results import best_of
from kfac_dist.study.trial_run import RUN_FOLDER, ClaimLost, run_trial, unfinished_result
from kfac_dist.study.trials import Trial

logger = logging.getLogger(__name__)

MOST_DEATHS = 3
"""A trial whose worker died so often has failed."""

_POLL_SECONDS = 1.0
_WISHES = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class WorkerSettings:
    """What all workers of a command have alike.

    Attributes:
        folder: The study's.
        parent: Process that started the workers, and without which they end.
        selected: Indices of the trials to run, in this order.
        threads: Of each worker.
        lease_seconds: After which a silent worker of another machine is dead.
        waits: Whether to stay while other workers train the last trials, which they may leave unfinished.
        keeps_runs: Whether the folders of finished runs stay.
    """

    folder: Path
    parent: int
    selected: Sequence[int]
    threads: int
    lease_seconds: float
    waits: bool
    keeps_runs: bool


class Stopped(BaseException):
    """A signal asked this worker to end; no exception that a library's ``except Exception`` may take for its own."""


def work(settings: WorkerSettings, number: int) -> None:
    """Take trials until none is left; ends the process with 75 where a signal stopped it.

    Args:
        settings: Of all workers.
        number: This worker's, from 0.
    """
    _write_to_file(settings.folder, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent passes it on
    try:
        for wish in _WISHES:
            signal.signal(wish, _stop)
        torch.set_num_threads(settings.threads)
        os.environ[PROGRESS_VARIABLE] = "off"  # of each run
        folder = StudyFolder(settings.folder)
        study, trials = folder.read_plan()
        while _work_through(settings, number, folder, study, trials):
            time.sleep(_POLL_SECONDS)
    except (Stopped, RunStopped):
        _stop_no_more()
        logger.info("stopped by a signal")
        sys.exit(75)


def _work_through(
    settings: WorkerSettings, number: int, folder: StudyFolder, study: Study, trials: Sequence[Trial]
) -> bool:
    """Run every trial that can be taken now; whether there may be more later."""
    took = False
    finished = folder.finished()
    for index in settings.selected:
        if index in finished or not _is_ready(trials[index], finished, folder):
            continue
        if _take(settings, number, folder, study, trials[index]):
            took = True
            finished = folder.finished()
    left = [index for index in settings.selected if index not in finished]
    return took or (settings.waits and any(_may_come(index, folder, trials, settings) for index in left))


def _take(settings: WorkerSettings, number: int, folder: StudyFolder, study: Study, trial: Trial) -> bool:
    """Run a trial if nobody else has it; whether this worker had it. A signal at any time leaves it given back."""
    claim = None
    try:
        with _told_later():
            claim = claim_trial(folder.trial(trial.index), settings.lease_seconds)
        if claim is None:
            return False
        if trial.index not in folder.finished():  # by the one who had it until now, perhaps
            _run_claimed(settings, number, folder, study, trial, claim)
        claim.release()  # whoever deletes its result wants it run again, by this worker perhaps
        return True
    except (Stopped, RunStopped):
        if claim is not None:
            try:
                claim.release()
            except Stopped:  # told again meanwhile, by the command or by the machine; not a third time
                claim.release()
        raise


def _may_come(index: int, folder: StudyFolder, trials: Sequence[Trial], settings: WorkerSettings) -> bool:
    """Whether a trial that is not finished can still become this worker's: somebody trains it, or what it waits for."""
    awaited = [index, *(trials[index].best_of or ())]
    return any(is_claimed(folder.trial(each), settings.lease_seconds) for each in awaited) or _is_ready(
        trials[index], folder.finished(), folder
    )


def _is_ready(trial: Trial, finished: Collection[int], folder: StudyFolder) -> bool:
    """Whether the trials that it takes the best of are all there and none failed, which a retry could make the best."""
    if trial.best_of is None:
        return True
    if not all(index in finished for index in trial.best_of):
        return False
    return all(folder.read_result(index)["status"] != "failed" for index in trial.best_of)


def _run_claimed(
    settings: WorkerSettings, number: int, folder: StudyFolder, study: Study, trial: Trial, claim: Claim
) -> None:
    """Train a trial that this worker has taken, and write its result."""
    place = folder.trial(trial.index)
    parameters = trial.parameters
    told_late: list[bool] = []
    logger.info("trial %d (%s, %s, batch %d)", trial.index, trial.model, trial.optimizer, trial.batch_size)
    try:
        if count_deaths(place) > MOST_DEATHS:
            raise InputError(f"its worker died {MOST_DEATHS} times; see {folder.workers}")
        parameters, config = _chosen(folder, study, trial)
        with Heartbeat(claim, settings.lease_seconds, settings.parent, _stop_self) as heartbeat:
            result = run_trial(
                study,
                trial,
                parameters,
                config,
                place,
                number,
                lambda: heartbeat.is_lost,
                lambda: told_late.append(True),
            )
    except RunStopped:
        raise
    except TrainingDiverged as error:
        result = unfinished_result(trial, parameters, "diverged", str(error))
    except ClaimLost:
        logger.warning("trial %d was taken by another worker meanwhile", trial.index)
        return
    except torch.AcceleratorError:
        logger.exception(
            "trial %d: this process cannot use its GPU any more, and ends for another to take over", trial.index
        )
        os.kill(os.getpid(), signal.SIGKILL)  # counts as a death, so that a trial which always does so fails in the end
        raise
    except Exception as error:
        logger.exception("trial %d failed", trial.index)
        last_line = traceback.format_exception_only(error)[-1].strip()
        result = unfinished_result(trial, parameters, "failed", last_line)
    if claim.is_last:
        folder.write_result(trial.index, result)
        if not settings.keeps_runs and result["status"] != "failed":
            shutil.rmtree(place / RUN_FOLDER, ignore_errors=True)
    if told_late:
        raise Stopped


def _chosen(folder: StudyFolder, study: Study, trial: Trial) -> tuple[dict[str, float], dict[str, object]]:
    """Parameters and configuration of a trial.

    Raises:
        TrainingDiverged: If it is to be the best of others, of which none came to its end.
    """
    if trial.best_of is None:
        assert trial.parameters is not None
        assert trial.config is not None
        return trial.parameters, trial.config
    assert study.best is not None
    results = [folder.read_result(index) for index in trial.best_of]
    best = best_of(results, study.best.by)
    if best is None:
        raise TrainingDiverged("all configurations that it takes the best of diverged")
    _, trials = folder.read_plan()
    config = trials[best["index"]].config
    assert config is not None
    return best["parameters"], {**config, "run": {**config["run"], "seed": trial.seed}}


def _write_to_file(folder: Path, number: int) -> None:
    """What this process prints goes to a file from here on."""
    path = folder / "workers" / f"{socket.gethostname()}-{number}-{os.getpid()}.log"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")


def _stop(number: int, frame: object) -> None:
    """Between trials; while one trains, the trainer has handlers of its own. Once is enough: the process ends."""
    del number, frame
    _stop_no_more()
    raise Stopped


def _stop_no_more() -> None:
    for wish in _WISHES:
        signal.signal(wish, signal.SIG_IGN)


@contextmanager
def _told_later() -> Iterator[None]:
    """A signal within it stops the worker at its end: what is done is done whole, and its result known."""
    told: list[int] = []
    previous = {wish: signal.signal(wish, lambda number, frame: told.append(number)) for wish in _WISHES}
    try:
        yield
    finally:
        for wish, handler in previous.items():
            signal.signal(wish, handler)
    if told:
        _stop(told[0], None)


def _stop_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)

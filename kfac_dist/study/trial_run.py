"""Training one trial, in this process and without MPI."""

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kfac_dist.communicator.devices import check_precision, choose_device
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.config.load import create_config
from kfac_dist.config.schema import Config
from kfac_dist.data.create import create_dataset
from kfac_dist.errors import EndNotSaved, InputError, TrainingDiverged
from kfac_dist.runs.environment import cpu_model
from kfac_dist.runs.folders import choose_run_directory
from kfac_dist.runs.reader import read_metrics
from kfac_dist.study.definition import Study
from kfac_dist.study.results import summarise
from kfac_dist.study.trials import Trial
from kfac_dist.training.divergence import DivergenceCheck
from kfac_dist.training.trainer import Trainer

RUN_FOLDER = "run"
_FEWEST_ITERATIONS = 5


def check_data(trials: Iterable[Trial]) -> None:
    """Read the study's data set once, before every trial fails of what is missing in it; all trials have the same.

    Raises:
        InputError: If it cannot be read, as a trial would tell.
    """
    settings = next((trial.config for trial in trials if trial.config is not None), None)
    if settings is not None:
        config = create_config(settings, "the study's recipe")
        create_dataset(config.data, config.augment, torch.device("cpu"), torch.float32, config.run.seed)


class ClaimLost(Exception):
    """Another worker has taken the trial: this one was held up for longer than the lease."""


class EarlyDivergence(DivergenceCheck):
    """Ends a trial whose last epoch, or last 5 iterations where that is more, is hopeless: it counts as diverged.

    A training run of its own is judged at its end only, since a few come back; in a study that would cost most of the
    budget of every configuration that diverged.
    """

    def __init__(self, num_classes: int, per_epoch: int, is_lost: Callable[[], bool]) -> None:
        super().__init__(num_classes, max(per_epoch, _FEWEST_ITERATIONS))
        self._is_lost = is_lost

    def see(self, loss: float, iteration: int, epoch: float, gave_up: bool) -> None:
        super().see(loss, iteration, epoch, gave_up)
        if self._is_lost():
            raise ClaimLost
        if len(self._recent) == self._recent.maxlen:
            self.check_end()


class TrialTrainer(Trainer):
    """A trainer on one rank that ends hopeless runs early and knows its evaluations' processor time."""

    def __init__(self, config: Config, device: torch.device, is_lost: Callable[[], bool]) -> None:
        super().__init__(config, LocalCommunicator(), device)
        per_epoch = -(-self.dataset.num_train // config.batch.global_size)
        self.divergence = EarlyDivergence(self.dataset.num_classes, per_epoch, is_lost)
        self.evaluation_cpu_seconds = 0.0

    @property
    def is_told_to_stop(self) -> bool:
        """Whether a signal came, however late."""
        return bool(self._stops.received)

    def evaluate(self, beat: Callable[[], None] = lambda: None) -> tuple[float, float, float]:
        start = time.process_time()
        try:
            return super().evaluate(beat)
        finally:
            self.evaluation_cpu_seconds += time.process_time() - start


def run_trial(
    study: Study,
    trial: Trial,
    parameters: Mapping[str, float],
    settings: Mapping[str, Any],
    folder: Path,
    worker: int,
    is_lost: Callable[[], bool],
    on_told_late: Callable[[], None],
) -> dict[str, Any]:
    """Train a trial, or go on with it where it was last saved.

    Args:
        study: For its targets.
        trial: What to train.
        parameters: Of its grid.
        settings: Its configuration.
        folder: The trial's.
        worker: This worker's number on the machine, by which GPUs are dealt out.
        is_lost: Whether another worker has taken the trial.
        on_told_late: Called if a signal asked to stop when the trial was at its end: it is done, and the worker is to
            end.

    Returns:
        Its result, of status ``done`` or ``diverged``.

    Raises:
        RunStopped: If a signal asked for it, after a checkpoint.
        ClaimLost: If another worker has taken it.
        InputError: If a run that is there has no checkpoint and cannot be removed.
        Exception: Whatever training raises.
    """
    config = create_config(_in_folder(settings, folder), f"trial {trial.index}")
    device = choose_device(config.run.device, worker)
    check_precision(config.train.precision, device)
    run = folder / RUN_FOLDER
    trainer = TrialTrainer(config, device, is_lost)
    if not (run.is_dir() and trainer.resume(run)):
        shutil.rmtree(run, ignore_errors=True)
        if choose_run_directory(folder, RUN_FOLDER) != run:  # the result would be that of the run which is there
            raise InputError(f"{run}: cannot be removed; delete it, then retry the trial")
    seconds_before, cpu_start = trainer.seconds_before, time.process_time()
    status, error = "done", None
    try:
        trainer.train()
    except EndNotSaved:
        pass  # a result is made of the metrics, not of the weights
    except TrainingDiverged as problem:
        status, error = "diverged", str(problem)
    if trainer.is_told_to_stop:
        on_told_late()
    cpu_seconds = time.process_time() - cpu_start - trainer.evaluation_cpu_seconds
    summary = summarise(read_metrics(run), trial.batch_size, study.targets)
    share = 1 - seconds_before / trainer.seconds()  # that this process trained
    return {
        **_identity(trial, parameters),
        "status": status,
        **summary,
        "cpu_seconds": cpu_seconds / share if share > 0 else cpu_seconds,
        "error": error,
        "environment": _environment(device),
    }


def unfinished_result(trial: Trial, parameters: Mapping[str, float] | None, status: str, error: str) -> dict[str, Any]:
    """The result of a trial of which nothing is known but why."""
    return {
        **_identity(trial, parameters or {}),
        "status": status,
        **summarise([], trial.batch_size, ()),
        "cpu_seconds": 0.0,
        "error": error,
        "environment": _environment(None),
    }


def _identity(trial: Trial, parameters: Mapping[str, float]) -> dict[str, Any]:
    return {
        "index": trial.index,
        "model": trial.model,
        "optimizer": trial.optimizer,
        "batch_size": trial.batch_size,
        "seed": trial.seed,
        "parameters": dict(parameters),
    }


def _environment(device: torch.device | None) -> dict[str, Any]:
    machine = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else cpu_model()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": machine,
        "python": platform.python_version(),
    }


def _in_folder(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {**settings, "run": {**settings["run"], "name": RUN_FOLDER, "output_dir": str(folder)}}

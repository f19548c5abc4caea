"""A trainer's state as a checkpoint holds it: when it is saved, and how a run goes on from it."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kfac_dist.checkpoints.manifest import MANIFEST_FILE, Manifest
from kfac_dist.checkpoints.save import MODEL_FILE
from kfac_dist.checkpoints.shard import read_tensors
from kfac_dist.checkpoints.store import CheckpointStore
from kfac_dist.communicator import Communicator
from kfac_dist.communicator.coalesced import mean_over_ranks
from kfac_dist.config.load import check_resumable
from kfac_dist.config.schema import Config, RunConfig
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Dataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import EndNotSaved, InputError
from kfac_dist.models import SlotwiseBatchNorm
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.distributed_fisher import BLOCKS
from kfac_dist.optim.kfac import STATE_KEY
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.runs.folders import last_run_directory, run_of_job
from kfac_dist.runs.lock import RunLock
from kfac_dist.runs.reader import METRICS_FILE
from kfac_dist.runs.writer import DONE_FILE
from kfac_dist.training.checkpoint import (
    Checkpointer,
    Found,
    RankState,
    code_version,
    find_checkpoint,
    now,
    read_state,
)
from kfac_dist.training.divergence import DivergenceCheck
from kfac_dist.training.recovery import Recovery
from kfac_dist.training.reporter import Reporter, ResumedRun

logger = logging.getLogger(__name__)

_ANY = "surrogateescape"  # a path may be no text


class Run(Protocol):
    """What a trainer has that a checkpoint holds, or needs to know; see `Trainer`."""

    config: Config
    communicator: Communicator
    dataset: Dataset
    sampler: SlotSampler
    model: nn.Module
    batchnorm: SlotwiseBatchNorm
    optimizer: DistributedOptimizer
    augmentation: Augmentation
    loss_scaler: LossScaler | None
    divergence: DivergenceCheck
    recovery: Recovery
    iteration: int
    top1: float
    best_top1: float
    seconds_before: float

    def seconds(self) -> float:
        """Of training so far."""


class RunSaver:
    """Saves a trainer's run into the folder that its reporter writes to."""

    def __init__(self, trainer: Run, reporter: Reporter) -> None:
        """Set up; the first time to save by the clock is counted from now."""
        settings = trainer.config.checkpoint
        self._trainer, self._reporter = trainer, reporter
        self._checkpointer = Checkpointer(reporter.directory, trainer.communicator, settings.keep, settings.keep_best)
        self._every_seconds = 60 * settings.every_minutes if settings.every_minutes is not None else float("inf")
        self._saved_at = time.monotonic()
        self._seconds_blocked = 0.0

    @property
    def wants_save(self) -> bool:
        """Whether it is time to save, by rank 0's clock; other ranks never want it."""
        return self._trainer.communicator.is_main and time.monotonic() - self._saved_at > self._every_seconds

    def save(self, wait: bool) -> None:
        """Save the run as it is between two iterations; collective.

        Args:
            wait: Return when it is on the disk.
        """
        trainer, start = self._trainer, time.perf_counter()
        state = take_state(trainer, self._reporter.sync())
        fine = self._checkpointer.save(state, trainer.optimizer.owned_blocks(first_only=True), self._manifest(), wait)
        self._saved_at = time.monotonic()
        self._seconds_blocked += time.perf_counter() - start
        if not fine:
            self._reporter.event(trainer.iteration - 1, "checkpoint_failed", failed=self._checkpointer.num_failed)

    @property
    def summary(self) -> dict[str, Any]:
        """For the end of the run: checkpoints that failed, and seconds that training has waited for any."""
        return {
            "failed_checkpoints": self._checkpointer.num_failed,
            "checkpoint_seconds_blocked": self._seconds_blocked,
        }

    def finish(self) -> None:
        """Wait for what is being written; collective."""
        if not self._checkpointer.finish():
            self._reporter.event(self._trainer.iteration - 1, "checkpoint_failed", failed=self._checkpointer.num_failed)

    def finish_run(self) -> None:
        """`finish` at the end of the run, whose weights must be on the disk; collective.

        Raises:
            EndNotSaved: If its checkpoint could not be written.
        """
        self.finish()
        if self._checkpointer.newest_failed:
            raise EndNotSaved(
                f"the run came to its end, but its last checkpoint could not be written to {self._reporter.directory}; "
                "a warning above or in its log.txt says why. With that mended, such as with room on the disk, go on "
                "with --resume auto"
            )

    def _manifest(self) -> Manifest:
        trainer = self._trainer
        return Manifest(
            iteration=trainer.iteration,
            num_ranks=trainer.communicator.size,
            top1=trainer.top1 if trainer.best_top1 else None,
            config=trainer.config.to_yaml(),
            data=_data_of(trainer),
            code_version=code_version(),
            created=now(),
            files={},
        )


def resume(trainer: Run, place: Path) -> ResumedRun | None:
    """Put a new trainer where a run was last saved whole; collective. None, and no change, if it never was.

    Args:
        trainer: That has not trained yet.
        place: A run's folder, or a checkpoint's.

    Raises:
        AgreedInputError: If the run's configuration, data or network was another.
    """
    communicator = trainer.communicator
    run = run_of(place)
    with communicator.raise_on_all_ranks():  # before another job deletes what is read here
        lock = RunLock(run) if communicator.is_main else None
    found = find_checkpoint(place, communicator)
    if found is None:
        if lock is not None:
            lock.release()
        return None
    with communicator.raise_on_all_ranks():
        check_resumable(found.manifest.config, trainer.config)
        if found.manifest.data != _data_of(trainer):
            raise InputError(
                f"{found.path}: was saved with other data: {found.manifest.data}, now there are {_data_of(trainer)}"
            )
    metrics_bytes = load_checkpoint(trainer, found)
    if communicator.is_main:
        logger.info("resumed at iteration %d from %s", trainer.iteration, found.path)
    return ResumedRun(run, metrics_bytes, trainer.iteration, lock)


def refuse_unusable(place: Path, communicator: Communicator) -> None:
    """Refuse to begin anew where `resume` found checkpoints, but none that is whole; collective.

    Raises:
        AgreedInputError: If there are any.
    """
    with communicator.raise_on_all_ranks():
        if communicator.is_main and CheckpointStore(run_of(place)).newest_first():
            raise InputError(
                f"{place} has no checkpoint that can be used, a warning above says why. Without --resume a new run "
                "begins"
            )


def load_checkpoint(trainer: Run, found: Found) -> int:
    """Put a trainer where this checkpoint was made; how long the metrics were then. Collective.

    Later checkpoints of the run, damaged ones or of a future that is given up, are set aside: the next `--resume auto`
    would else go on from them.
    """
    communicator = trainer.communicator
    with communicator.raise_on_all_ranks():
        blocks = trainer.optimizer.owned_blocks(first_only=False)
        slots = list(trainer.sampler.local_slots(communicator.rank, communicator.size))
        state = read_state(found, communicator.rank, communicator.size, blocks, slots)
    with communicator.raise_on_all_ranks():
        try:
            restore_state(trainer, state)
            metrics_bytes = int(state.run["metrics_bytes"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{found.path}: does not hold the state of such a run ({error!r:.200})") from error
    with communicator.raise_on_all_ranks():
        if communicator.is_main:
            _set_aside_later(found)
    return metrics_bytes


def _set_aside_later(found: Found) -> None:
    try:
        moved = CheckpointStore(run_of(found.path)).set_aside_after(found.manifest.iteration)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be renamed ({error.strerror}); move it out of the run") from error
    for path in moved:
        logger.warning("a later checkpoint is set aside, as %s: delete it if it is not wanted", path)


def run_of(place: Path) -> Path:
    """The run that a folder is, or that the checkpoint in it belongs to."""
    return place.resolve().parent.parent if (place / MANIFEST_FILE).exists() else place


def find_run(wanted: str, config: RunConfig, communicator: Communicator) -> tuple[Path | None, bool]:
    """Which run to go on with; collective, rank 0 looks.

    Args:
        wanted: "auto" for the last run of the configured name, or for its own in a job that Slurm queued again; "job"
            for that which this job of Slurm's began; or a path.
        config: The section `run`.
        communicator: Of all ranks.

    Returns:
        The folder of a run or of a checkpoint, None if "auto" or "job" finds no run; and whether it is finished.

    Raises:
        AgreedInputError: If there is nothing at the path.
    """
    told = ""
    with communicator.raise_on_all_ranks():
        if communicator.is_main:
            place = _look_for(wanted, config)
            told = f"{place or ''}\n{int(place is not None and (place / DONE_FILE).exists())}"
    path, is_done = communicator.gather_bytes(told.encode(errors=_ANY))[0].decode(errors=_ANY).rsplit("\n", 1)
    return Path(path) if path else None, bool(int(is_done))


def _look_for(wanted: str, config: RunConfig) -> Path | None:
    if wanted == "auto":
        # Of a job that was queued again its own, as scripts/slurm/finished.py has it: the last may be another's by now.
        is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        own = run_of_job(config.output_dir, config.name, _slurm_job()) if is_requeued else None
        return own or last_run_directory(config.output_dir, config.name)
    if wanted == "job":
        return run_of_job(config.output_dir, config.name, _slurm_job())
    place = Path(wanted).expanduser()
    if not _is_resumable(place):
        raise InputError(f"--resume must be auto, job, or the folder of a run or of a checkpoint, got {wanted}")
    return place


def _is_resumable(place: Path) -> bool:
    return (place / METRICS_FILE).is_file() or (place / MANIFEST_FILE).is_file()


def _slurm_job() -> str:
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job:
        raise InputError("--resume job needs the variable SLURM_JOB_ID, which Slurm sets; elsewhere use --resume auto")
    return job


def load_weights(trainer: Run, wanted: str) -> Path:
    """Take over the weights of a checkpoint, or of the newest whole one of a run, and nothing else; collective.

    Returns:
        Where they were.

    Raises:
        AgreedInputError: If there is none, or it is of another network or other data.
    """
    communicator = trainer.communicator
    place = Path(wanted).expanduser()
    with communicator.raise_on_all_ranks():
        if not place.is_dir():
            raise InputError(f"--evaluate must be the folder of a run or of a checkpoint, got {wanted}")
    found = find_checkpoint(place, communicator)
    with communicator.raise_on_all_ranks():
        if found is None:
            raise InputError(f"--evaluate: {wanted} has no checkpoint that is whole")
        before, now_there = found.manifest.data, _data_of(trainer)
        for key in ("num_classes", "image_shape"):
            if before.get(key) != now_there[key]:
                raise InputError(f"{found.path}: its data.{key} was {before.get(key)}, now there are {now_there[key]}")
        _load_model(trainer, read_tensors(found.path / MODEL_FILE))
    assert found is not None, "refused above"
    return found.path


def _load_model(trainer: Run, weights: Mapping[str, torch.Tensor]) -> None:
    try:
        trainer.model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InputError(f"the checkpoint is of another network: {error}") from error


def take_state(trainer: Run, metrics_bytes: int = 0) -> RankState:
    """All that this rank's part of the rest of the run depends on; collective, copies little."""
    optimizer = trainer.optimizer.state_dict()
    blocks: dict[str, Any] = {}
    if STATE_KEY in optimizer:
        curvature = dict(optimizer[STATE_KEY])
        blocks = curvature.pop(BLOCKS)
        optimizer[STATE_KEY] = curvature
    names = {id(buffer): name for name, buffer in trainer.model.named_buffers()}
    running = trainer.batchnorm.running_buffers()
    means = mean_over_ranks(trainer.communicator, running)
    averages = {names[id(buffer)]: mean for buffer, mean in zip(running, means, strict=True)}
    scaler = trainer.loss_scaler
    return RankState(
        run={
            "iteration": trainer.iteration,
            "top1": trainer.top1,
            "best_top1": trainer.best_top1,
            "seconds": trainer.seconds(),
            "communication_bytes": trainer.communicator.payload_bytes,
            "metrics_bytes": metrics_bytes,
            "divergence": trainer.divergence.state_dict(),
            "recovery": trainer.recovery.state_dict(),
            "optimizer": optimizer,
            "loss_scaler": scaler.state_dict() if scaler is not None else None,
        },
        weights={**trainer.model.state_dict(), **averages},
        buffers=dict(trainer.model.named_buffers()),
        blocks=blocks,
        mixup=trainer.augmentation.state_dict(),
    )


@torch.no_grad()
def restore_state(trainer: Run, state: RankState) -> None:
    """Go on where `take_state` was called, on this or another number of ranks.

    Raises:
        InputError: If it is the state of another network.
    """
    run = state.run
    _load_model(trainer, state.weights)
    for name, buffer in trainer.model.named_buffers():
        if name in state.buffers:
            buffer.copy_(state.buffers[name])
    optimizer = dict(run["optimizer"])
    if STATE_KEY in optimizer:
        optimizer[STATE_KEY] = {**optimizer[STATE_KEY], BLOCKS: dict(state.blocks)}
    trainer.optimizer.load_state_dict(optimizer)
    trainer.augmentation.load_state_dict(state.mixup)
    if trainer.loss_scaler is not None and run["loss_scaler"] is not None:
        trainer.loss_scaler.load_state_dict(run["loss_scaler"])
    trainer.iteration, trainer.top1, trainer.best_top1 = run["iteration"], run["top1"], run["best_top1"]
    trainer.divergence.load_state_dict(run["divergence"])
    trainer.recovery.load_state_dict(run["recovery"])
    trainer.seconds_before = run["seconds"]
    trainer.communicator.payload_bytes = run["communication_bytes"]


def _data_of(trainer: Run) -> dict[str, Any]:
    dataset = trainer.dataset
    return {
        "num_train": dataset.num_train,
        "num_eval": dataset.num_eval,
        "num_classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
    }

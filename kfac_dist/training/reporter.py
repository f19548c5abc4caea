"""What a run tells: metrics, events and the progress display."""

import logging
import math
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kfac_dist.communicator import Communicator, library_version
from kfac_dist.config.schema import Config
from kfac_dist.curvature.blocks.base import FactorKey
from kfac_dist.optim.step_report import StepReport
from kfac_dist.runs.environment import describe_environment
from kfac_dist.runs.folders import claim_run_directory
from kfac_dist.runs.lock import RunLock
from kfac_dist.runs.log import RunLog
from kfac_dist.runs.progress import Progress
from kfac_dist.runs.writer import RunWriter
from kfac_dist.tensors.host_copy import HostCopy
from kfac_dist.timing import StageSeconds
from kfac_dist.training.schedules import Schedules, Settings

logger = logging.getLogger(__name__)

_ANY = "surrogateescape"  # a path may be no text


class Totals(NamedTuple):
    """What is added up over the ranks in an iteration, in the order in which it travels.

    Attributes:
        loss: Mean loss.
        correct: Share of correct answers.
        retries: Of the update before; see `StepReport`.
        kept_inverses: Likewise.
        wants_save: Ranks that want a checkpoint.
        wants_stop: Ranks that want to stop.
    """

    loss: float
    correct: float
    retries: float
    kept_inverses: float
    wants_save: float
    wants_stop: float


@dataclass(frozen=True)
class IterationResult:
    """An update that was launched, on a GPU perhaps not done yet.

    Attributes:
        iteration: Its number.
        settings: What the optimizer used.
        loss_scale: What the loss was multiplied with; None where it is not scaled.
        totals: Values of `Totals`, on their way to the host.
        stages: Seconds of each stage.
        communication_bytes: Payload of the V-collectives.
        step: What the optimizer reports.
        launched_at: When the host was through with it, by `time.perf_counter`.
    """

    iteration: int
    settings: Settings
    loss_scale: float | None
    totals: HostCopy
    stages: StageSeconds
    communication_bytes: int
    step: StepReport
    launched_at: float


@dataclass(frozen=True)
class Told:
    """What all ranks know alike after an iteration: its mean loss, and what some rank wants to be done."""

    loss: float
    wants_save: bool
    wants_stop: bool

    def __or__(self, later: "Told") -> "Told":
        """The later loss, and what is wanted in either."""
        return Told(later.loss, self.wants_save or later.wants_save, self.wants_stop or later.wants_stop)


@dataclass(frozen=True)
class ResumedRun:
    """A run that goes on.

    Attributes:
        directory: Its folder.
        metrics_bytes: How much of its metrics holds: what was written up to the checkpoint.
        iteration: The next one.
        lock: On its folder; rank 0 has it.
    """

    directory: Path
    metrics_bytes: int
    iteration: int
    lock: RunLock | None


@dataclass(frozen=True)
class Result:
    """How a run ended: final test accuracy in percent, and where its files are."""

    top1: float
    iterations: int
    seconds: float
    directory: Path


class Reporter:
    """Writes a run's metrics and shows its progress; every rank calls the same methods, rank 0 writes.

    Attributes:
        directory: The run's folder.
    """

    def __init__(
        self,
        config: Config,
        communicator: Communicator,
        schedules: Schedules,
        resumed: ResumedRun | None = None,
        log: RunLog | None = None,
    ) -> None:
        """Open the run's folder, which rank 0 chooses; collective.

        Args:
            config: The run's.
            communicator: Collectives over the ranks.
            schedules: The run's.
            resumed: The run that goes on; None for a new one.
            log: Is opened in the run's folder.

        Raises:
            AgreedInputError: If it cannot be written, or KFAC_DIST_PROGRESS is wrong.
        """
        monitor = config.kfac.monitor if config.kfac is not None else None
        self.wants_spectra = monitor is not None and monitor.spectrum
        self._wants_changes = monitor is not None and monitor.diff
        self._schedules = schedules
        self._batch_size = config.batch.global_size
        with communicator.raise_on_all_ranks():
            record = partial(log.write, "INFO") if log is not None else _to_nowhere
            self._progress = Progress(schedules.num_iterations, communicator.is_main, record=record)
            if resumed is not None:
                self._progress.go_to(resumed.iteration)
        self._lock = resumed.lock if resumed is not None else None
        with communicator.raise_on_all_ranks():
            # Once for all ranks: another would find that this one has taken it.
            chosen = Path()
            if communicator.is_main:
                chosen = resumed.directory if resumed else claim_run_directory(config.run.output_dir, config.run.name)
                self._lock = self._lock or RunLock(chosen)
        self.directory = Path(communicator.gather_bytes(str(chosen).encode(errors=_ANY))[0].decode(errors=_ANY))
        hosts = [name.decode() for name in communicator.gather_bytes(socket.gethostname().encode())]
        environment = describe_environment(library_version(), hosts)
        with communicator.raise_on_all_ranks():
            self._writer = RunWriter(
                self.directory,
                communicator.is_main,
                config.to_yaml(),
                environment,
                resumed.metrics_bytes if resumed else None,
            )
        if log is not None:
            log.open(self.directory)
        if resumed is not None:
            self.event(resumed.iteration, "resumed", ranks=communicator.size)
        self._ended_at = time.perf_counter()  # the last iteration, for images per second

    def iteration(self, result: IterationResult, is_newest: bool) -> Told:
        """Report an iteration; waits for it.

        Args:
            result: What came of it.
            is_newest: Whether none has been launched since: it took until it is done.
        """
        totals = Totals(*result.totals.read().tolist())
        iteration, loss, top1 = result.iteration, totals.loss, 100 * totals.correct
        epoch = self._schedules.epoch_at(iteration + 1)
        self.retries(iteration - 1, int(totals.retries), int(totals.kept_inverses))
        stage_seconds = result.stages.read()
        ended_at = time.perf_counter() if is_newest else result.launched_at
        images_per_second, self._ended_at = self._batch_size / (ended_at - self._ended_at), ended_at
        scale = {} if result.loss_scale is None else {"loss_scale": result.loss_scale}
        self._writer.write(
            "train", iteration=iteration, epoch=epoch, loss=loss, top1=top1, **vars(result.settings), **scale,
            images_per_second=images_per_second, stage_seconds=stage_seconds,
            communication_bytes=result.communication_bytes,
        )  # fmt: skip
        if self._wants_changes:
            for (layer, matrix), change in result.step.changes.items():
                if math.isfinite(change):  # the first refresh of a matrix has no Diff
                    self._writer.write("fisher", iteration=iteration, layer=layer, matrix=matrix, diff=change)
        if not math.isfinite(loss):
            self.event(iteration, "nonfinite", loss=loss, **scale)
        elif result.step.skipped:
            self.event(iteration, "overflow", **scale)
        self._progress.update(epoch, loss, top1, images_per_second)
        return Told(loss, bool(totals.wants_save), bool(totals.wants_stop))

    def retries(self, iteration: int, retries: int, kept: int) -> None:
        """Report factorisations of an iteration that needed more damping, and those of them that failed for good."""
        if retries:
            self.event(iteration, "retry", retries=retries, kept_inverses=kept)

    def go_back(self, iteration: int, metrics_bytes: int) -> None:
        """The run goes on from its last checkpoint: what was written since is dropped."""
        self._writer.cut(metrics_bytes)
        self._progress.go_to(iteration)

    def evaluation(self, iteration: int, loss: float, top1: float, top5: float) -> None:
        """Report an evaluation after an iteration; accuracies in percent."""
        epoch = self._schedules.epoch_at(iteration + 1)
        self._writer.write("eval", iteration=iteration, epoch=epoch, loss=loss, top1=top1, top5=top5)
        self._progress.say(f"epoch {epoch:.2f}: test loss {loss:.4f}, top-1 {top1:.2f} %")
        self._ended_at = time.perf_counter()

    def spectra(self, iteration: int, spectra: dict[FactorKey, tuple[float, float, float]]) -> None:
        """Report smallest and largest eigenvalue and effective rank of each running matrix."""
        for (layer, matrix), (smallest, largest, rank) in spectra.items():
            self._writer.write(
                "fisher", iteration=iteration, layer=layer, matrix=matrix,
                smallest_eigenvalue=smallest, largest_eigenvalue=largest, effective_rank=rank,
            )  # fmt: skip

    def skipped_images(self, iteration: int, problems: list[str]) -> None:
        """Report images that some rank has skipped for the first time."""
        for problem in problems:
            self.event(iteration, "skipped_picture", problem=problem)
            self._progress.say(f"skipped: {problem}")

    def sync(self) -> int:
        """Put the metrics on the disk; their length so far, 0 on ranks that do not write."""
        return self._writer.sync()

    def event(self, iteration: int, event: str, **fields: Any) -> None:
        """Report something out of the ordinary."""
        self._writer.write("event", iteration=iteration, event=event, **fields)

    def finish(self, **summary: Any) -> None:
        """Write the summary and mark the run as finished."""
        self._writer.write("summary", **summary)
        self._writer.finish()

    def close(self) -> None:
        """Close the files and the display; the run is not marked as finished by this."""
        self._writer.close()
        self._progress.close()
        if self._lock is not None:
            self._lock.release()


def _to_nowhere(text: str) -> None:
    del text

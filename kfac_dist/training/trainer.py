"""The training loop: slots, an optimizer's step and evaluation; what surrounds them stands in this folder's modules."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from kfac_dist.communicator import Communicator
from kfac_dist.config.load import warnings_of
from kfac_dist.config.schema import Config
from kfac_dist.data.base import Batch
from kfac_dist.errors import RunStopped, TrainingDiverged
from kfac_dist.runs.log import RunLog
from kfac_dist.training.divergence import DivergenceCheck
from kfac_dist.training.fallback import fall_back
from kfac_dist.training.learner import Learner
from kfac_dist.training.reporter import IterationResult, Reporter, Result, ResumedRun, Told
from kfac_dist.training.restarts import count_restart, note_start
from kfac_dist.training.run_state import RunSaver, resume, run_of
from kfac_dist.training.signals import StopSignals
from kfac_dist.training.watchdog import Watchdog
from kfac_dist.vocabulary import counted

logger = logging.getLogger(__name__)


class Trainer(Learner):
    """One run of a configuration on all ranks of a communicator.

    for each iteration: train (see `Learner`); report; evaluate and save where it is due
    """

    def __init__(
        self, config: Config, communicator: Communicator, device: torch.device, log: RunLog | None = None
    ) -> None:
        """Read the data and build network and optimizer; collective.

        Args:
            config: A validated configuration.
            communicator: Collectives over the ranks.
            device: Where this rank computes.
            log: Is opened in the run's folder.

        Raises:
            InputError: If the data, the model or the batch do not fit; the same on every rank.
        """
        super().__init__(config, communicator, device)
        self._log = log
        per_epoch = math.ceil(self.dataset.num_train / config.batch.global_size)
        self.divergence = DivergenceCheck(self.dataset.num_classes, per_epoch)
        self.top1 = self.best_top1 = 0.0
        self.resumed: ResumedRun | None = None
        self.seconds_before = 0.0  # of a run that was resumed
        self._started = time.perf_counter()
        self._stops = StopSignals()
        self._restarts = 0  # without progress
        self._watchdog = Watchdog(
            config.run.watchdog_minutes, communicator.rank, self.timer, lambda: self.iteration, log
        )

    def resume(self, run: Path) -> bool:
        """Go on with a run, or from a checkpoint, where it was last saved whole; collective.

        Returns:
            Whether there is such a checkpoint; else nothing has changed.

        Raises:
            InputError: If it was saved with another configuration or other data; the same on every rank.
            NoProgress: If it was restarted too often without coming further; likewise.
        """
        self.resumed = resume(self, run)
        self._restarts = count_restart(run_of(run), self.iteration, self.communicator)
        return self.resumed is not None

    def train(self) -> Result:
        """Train to the end; collective.

        Raises:
            RunStopped: If a signal asked for it, after a checkpoint.
            TrainingFailed: If images are damaged; TrainingDiverged if the loss is no longer finite or hopeless;
                EndNotSaved if the last checkpoint could not be written.
        """
        self._started = time.perf_counter()
        self._log_start()
        num_iterations = self.schedules.num_iterations
        reporter = Reporter(self.config, self.communicator, self.schedules, self.resumed, self._log)
        with closing(reporter), self._stops, self._watchdog:
            logger.info("run: %s", reporter.directory)
            note_start(reporter.directory, self.iteration, self._restarts, self.communicator)
            saver = RunSaver(self, reporter)
            batches = self._batches()
            launched: deque[IterationResult] = deque()
            while self.iteration < num_iterations:
                iteration = self.iteration
                launched.append(self._train_iteration(iteration, batches, partial(self._wishes, saver)))
                self.iteration += 1
                evaluates = self.schedules.evaluation_is_due(iteration)
                saves = self.schedules.checkpoint_is_due(iteration)
                # A GPU goes on while the host looks at the iteration before.
                told = self._report(launched, 0 if evaluates or saves or self.device.type == "cpu" else 1, reporter)
                if self.recovery.wants_restore:
                    self.iteration -= len(launched)
                    launched.clear()
                    batches = self._fall_back(batches, saver, reporter)
                    continue
                is_best = evaluates and self._evaluate(iteration, reporter)
                saves |= told.wants_save or (is_best and self.config.checkpoint.keep_best)
                if told.wants_stop or saves:
                    told |= self._report(launched, 0, reporter)
                is_end = self.iteration == num_iterations
                # Weights that give no finite loss are not worth keeping, but a run's last where the loss scale decides.
                is_sound = not self.recovery.in_a_row or (is_end and self.loss_scaler is not None)
                if told.wants_stop or (saves and is_sound):
                    self._tell_retries(reporter)
                    saver.save(wait=told.wants_stop or is_end)
                if told.wants_stop and self.iteration < num_iterations:
                    raise RunStopped(f"stopped by a signal at iteration {self.iteration}; run: {reporter.directory}")
            self._tell_retries(reporter)
            self.divergence.check_end()
            if self.recovery.in_a_row and self.loss_scaler is None:
                raise TrainingDiverged(self.recovery.describe())
            saver.finish_run()
            reporter.finish(
                top1=self.top1, best_top1=self.best_top1, iterations=num_iterations, seconds=self.seconds(),
                communication_bytes=self.communicator.payload_bytes, skipped_pictures=len(self.skipped_images.skipped),
                skipped_updates=self.loss_scaler.num_overflows if self.loss_scaler is not None else 0,
                nonfinite_updates=self.recovery.num_nonfinite, restores=self.recovery.num_restores,
                **saver.summary,
            )  # fmt: skip
        return Result(self.top1, num_iterations, self.seconds(), reporter.directory)

    def seconds(self) -> float:
        """Of training so far, those before a resumption included."""
        return self.seconds_before + time.perf_counter() - self._started

    def _tell_retries(self, reporter: Reporter) -> None:
        """Report what the next iteration would, of the last update; collective."""
        counts = self.communicator.all_reduce_(torch.tensor(self._retries, dtype=torch.float64))
        self._retries = (0, 0)
        reporter.retries(self.iteration - 1, *map(int, counts.tolist()))

    def _fall_back(self, batches: Iterator[Batch], saver: RunSaver, reporter: Reporter) -> Iterator[Batch]:
        """Go back to the last checkpoint; the batches from there on."""
        fall_back(self, self.black_box, saver, reporter)
        self._retries = (0, 0)
        close = getattr(batches, "close", None)  # of a generator: its threads end
        if close is not None:
            close()
        return self._batches()

    def _wishes(self, saver: RunSaver) -> tuple[bool, bool]:
        """Whether this rank wants to save, and to stop."""
        return saver.wants_save, bool(self._stops.received)

    def _report(self, launched: deque[IterationResult], num_waiting: int, reporter: Reporter) -> Told:
        """Report all iterations but the last `num_waiting`; what ranks want, from any of them."""
        told = Told(0.0, wants_save=False, wants_stop=False)
        while len(launched) > num_waiting:
            told |= self._report_one(launched.popleft(), reporter, is_newest=not launched)
        return told

    def _report_one(self, result: IterationResult, reporter: Reporter, is_newest: bool) -> Told:
        """Report an iteration, and stop if training diverged."""
        told = reporter.iteration(result, is_newest)
        reporter.skipped_images(result.iteration, self.skipped_images.take_new())
        gave_up = result.step.skipped and result.loss_scale == 1
        epoch = self.schedules.epoch_at(result.iteration + 1)
        self.recovery.see(told.loss, result.iteration, epoch)
        self.divergence.see(told.loss, result.iteration, epoch, gave_up)
        return told

    def _evaluate(self, iteration: int, reporter: Reporter) -> bool:
        """Top-1 over all evaluation images, BatchNorm statistics averaged over the ranks; whether it is the best."""
        self._watchdog.activity = "evaluation"
        loss, self.top1, top5 = self.evaluate(self._watchdog.beat)
        self._watchdog.activity = "training"
        is_best = self.top1 > self.best_top1
        self.best_top1 = max(self.best_top1, self.top1)
        reporter.skipped_images(iteration, self.skipped_images.take_new())
        reporter.evaluation(iteration, loss, self.top1, top5)
        if reporter.wants_spectra:
            reporter.spectra(iteration, self.optimizer.spectra())
        return is_best

    def _log_start(self) -> None:
        logger.info(
            "%d training and %d test images, %d classes; %s of %d images: %s of %d a rank",
            self.dataset.num_train, self.dataset.num_eval, self.dataset.num_classes,
            counted(self.schedules.num_iterations, "iteration"), self.sampler.global_size,
            counted(self.num_local_slots, "slot"), self.sampler.per_slot,
        )  # fmt: skip
        for warning in warnings_of(self.config, self.dataset.num_train):
            logger.warning("warning: %s", warning)
        for line in self.optimizer.describe():
            logger.info("%s", line)

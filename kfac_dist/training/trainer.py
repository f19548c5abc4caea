"""The training loop: slots, an optimizer's step and evaluation; what surrounds them stands in this folder's modules."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import Communicator
from kfac_dist.config.load import batch_slots, warnings_of
from kfac_dist.config.schema import Config
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Batch
from kfac_dist.data.create import create_dataset
from kfac_dist.data.imagenet.image_file import ImageError
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.skipped import SkippedImages
from kfac_dist.errors import RunStopped, TrainingFailed
from kfac_dist.models import SlotwiseBatchNorm, create_model
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.precision import Precision, configure_backends
from kfac_dist.random_streams import RandomStream, keyed_generator
from kfac_dist.runs.log import RunLog
from kfac_dist.tensors.host_copy import HostCopy, to_device
from kfac_dist.timing import StageTimer
from kfac_dist.training.agreement import check_ranks_agree
from kfac_dist.training.black_box import BlackBox
from kfac_dist.training.build import Parts, create_optimizer
from kfac_dist.training.divergence import DivergenceCheck
from kfac_dist.training.evaluation import evaluate
from kfac_dist.training.fallback import fall_back
from kfac_dist.training.pretrained import load_pretrained
from kfac_dist.training.recovery import Recovery
from kfac_dist.training.reporter import IterationResult, Reporter, ResumedRun, Told
from kfac_dist.training.restarts import count_restart, note_start
from kfac_dist.training.run_state import RunSaver, resume, run_of
from kfac_dist.training.schedules import Schedules
from kfac_dist.training.signals import StopSignals
from kfac_dist.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended: final test accuracy in percent, and where its files are."""

    top1: float
    iterations: int
    seconds: float
    directory: Path


class Trainer:
    """One run of a configuration on all ranks of a communicator.

    for each iteration:
        for each of this rank's slots: augment → forward → backward      stages 1 and 2
        optimizer.step()                                                 stages 3 to 6
        report; evaluate where it is due
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
        self.config, self.communicator, self.device, self._log = config, communicator, device, log
        self.precision = Precision(config.train.precision)
        dtype, seed, batch = self.precision.weights, config.run.seed, config.batch
        # Tensor Cores convolve images whose channels lie together; a CPU is faster the other way.
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        configure_backends(config.run.deterministic)
        with communicator.raise_on_all_ranks():
            self.num_local_slots = batch_slots(config, communicator.size)
            self.dataset = create_dataset(config.data, config.augment, device, dtype, seed)
            model = create_model(
                config.model.name, self.dataset.num_classes, self.dataset.image_shape, seed,
                config.model.variant, config.model.zero_init_last_gamma, config.model.initialization,
            )  # fmt: skip
            if config.model.pretrained is not None:
                load_pretrained(model, config.model.pretrained)
            self.batchnorm = SlotwiseBatchNorm(model)
        check_ranks_agree(communicator, self.dataset, model)
        self.skipped_images = SkippedImages(self.dataset, communicator)
        self.model: nn.Module = model.to(device, dtype).to(memory_format=self.memory_format)
        self.sampler = SlotSampler(self.dataset.num_train, batch.per_rank, batch.global_size // batch.per_rank, seed)
        self.timer = StageTimer.on(device)
        self.loss_scaler = LossScaler() if self.precision.needs_loss_scale else None
        with communicator.raise_on_all_ranks():
            self.schedules = Schedules(config, self.sampler)
            parts = Parts(self.model, communicator, self.num_local_slots, self.schedules, self.timer, self.loss_scaler)
            self.optimizer = create_optimizer(config, parts)
        self.augmentation = Augmentation(config.augment, self.dataset.num_classes, seed)
        self.divergence = DivergenceCheck(
            self.dataset.num_classes, math.ceil(self.dataset.num_train / batch.global_size)
        )
        self.recovery = Recovery(config.train.max_nonfinite, config.train.max_restores)
        self.black_box = BlackBox(self.model, communicator, self.sampler)
        self.iteration = 0  # the next one
        self.top1 = self.best_top1 = 0.0
        self.resumed: ResumedRun | None = None
        self.seconds_before = 0.0  # of a run that was resumed
        self._started = time.perf_counter()
        self._stops = StopSignals()
        self._restarts = 0  # without progress
        self._retries = (0, 0)  # of the last update, not yet told
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

    def evaluate(self) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 in percent over all evaluation images; collective."""
        for buffer in self.batchnorm.running_buffers():
            self.communicator.all_reduce_(buffer, "mean")
        with self.precision.autocast(self.device):
            return evaluate(self.model, self.dataset, self.communicator, self.skipped_images, self._watchdog.beat)

    def train(self) -> Result:
        """Train to the end; collective.

        Raises:
            RunStopped: If a signal asked for it, after a checkpoint.
            TrainingFailed: If the loss is no longer finite or hopeless in the end, or images are damaged.
        """
        self._started = time.perf_counter()
        self._log_start()
        num_iterations = self.schedules.num_iterations
        reporter = Reporter(self.config, self.communicator, self.schedules, self.resumed, self._log)
        with closing(reporter), self._stops, self._watchdog:
            note_start(reporter.directory, self.iteration, self._restarts, self.communicator)
            saver = RunSaver(self, reporter)
            batches = self._batches()
            launched: deque[IterationResult] = deque()
            while self.iteration < num_iterations:
                iteration = self.iteration
                launched.append(self._train_iteration(iteration, batches, saver))
                self.iteration += 1
                evaluates = self.schedules.evaluation_is_due(iteration)
                saves = self.schedules.checkpoint_is_due(iteration)
                # A GPU goes on while the host looks at the iteration before.
                told = self._report(launched, 0 if evaluates or saves or self.device.type == "cpu" else 1, reporter)
                if self.recovery.wants_restore:
                    launched.clear()
                    batches = self._fall_back(batches, saver, reporter)
                    continue
                is_best = evaluates and self._evaluate(iteration, reporter)
                saves |= told.wants_save or (is_best and self.config.checkpoint.keep_best)
                # Weights that give no finite loss are not worth keeping.
                if told.wants_stop or (saves and not self.recovery.in_a_row):
                    self._report(launched, 0, reporter)
                    self._tell_retries(reporter)
                    saver.save(wait=told.wants_stop or self.iteration == num_iterations)
                if told.wants_stop and self.iteration < num_iterations:
                    raise RunStopped(f"stopped by a signal at iteration {self.iteration}; run: {reporter.directory}")
            self._tell_retries(reporter)
            self.divergence.check_end()
            if self.recovery.in_a_row and self.loss_scaler is None:
                raise TrainingFailed(self.recovery.describe())
            saver.finish()
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

    def _train_iteration(self, iteration: int, batches: Iterator[Batch], saver: RunSaver) -> IterationResult:
        """One update. On a GPU it is queued rather than done when this returns."""
        bytes_before = self.communicator.payload_bytes
        settings = self.schedules.settings(iteration)
        settings = replace(settings, damping=settings.damping * self.recovery.damping_factor)
        settings.apply_to(self.optimizer.param_groups)
        loss_scale = self.loss_scaler.scale if self.loss_scaler is not None else None
        self.model.train()
        self.optimizer.zero_grad()
        running = self.batchnorm.copy_of_running_buffers()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        losses = []
        problem = ""
        try:
            for index in range(self.num_local_slots):
                self.batchnorm.before_slot(index, self.num_local_slots)
                of_slot = self._train_slot(batches)
                losses.append(of_slot[0])
                sums += of_slot
        except ImageError as error:  # this rank's alone, until the others know
            problem = str(error)
        self.skipped_images.gather_and_check(problem)
        self.black_box.record(iteration, settings, losses)
        totals = self._total(sums, saver)
        # The loss of all ranks is known before the update. With a loss scale the optimizer asks for itself, and finds
        # every loss that is not finite; a GPU is waited for once either way.
        if self.loss_scaler is None and not math.isfinite(totals.read()[0]):
            self.optimizer.skip_step()
        else:
            self.optimizer.step()
        step = self.optimizer.report
        self._retries = (step.retries, step.kept_inverses)
        if step.skipped:  # what was not finite in the forward pass has spoilt these, too
            self.batchnorm.restore(running)
        moved = self.communicator.payload_bytes - bytes_before
        return IterationResult(iteration, settings, loss_scale, totals, self.timer.snapshot(), moved, step)

    def _total(self, sums: Tensor, saver: RunSaver) -> HostCopy:
        """Loss, share of correct answers, retries of the update before, and what is wanted, over all ranks."""
        wishes = [saver.wants_save, bool(self._stops.received)]
        counts = torch.tensor([*self._retries, *wishes], dtype=torch.float64)
        self._retries = (0, 0)
        averages = sums / (self.num_local_slots * self.communicator.size)
        return HostCopy(self.communicator.all_reduce_(torch.cat([averages, to_device(counts, self.device)])))

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

    def _train_slot(self, batches: Iterator[Batch]) -> Tensor:
        """Forward and backward of one micro-batch; returns its mean loss and share of correct answers."""
        with self.timer.stage("data"):
            batch = self.augmentation.apply(next(batches))
        # Dropout draws from torch's generator: key that too, so that a slot is the same on any rank.
        generator = keyed_generator(self.config.run.seed, RandomStream.TORCH, batch.iteration, batch.slot)
        torch.manual_seed(int(generator.integers(2**63)))
        images = batch.images.to(memory_format=self.memory_format)
        with self.timer.stage("forward"), self.precision.autocast(self.device):
            logits = self.model(images)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.train.label_smoothing)
        with self.timer.stage("backward"):
            scaled = loss / self.num_local_slots
            (scaled if self.loss_scaler is None else self.loss_scaler.scale_loss(scaled)).backward()
        correct = (logits.detach().argmax(dim=1) == batch.labels.argmax(dim=1)).double().mean()
        return torch.stack([loss.detach().double(), correct])

    def _report(self, launched: deque[IterationResult], num_waiting: int, reporter: Reporter) -> Told:
        """Report all iterations but the last `num_waiting`; what ranks want, from any of them."""
        told = Told(0.0, wants_save=False, wants_stop=False)
        while len(launched) > num_waiting:
            told |= self._report_one(launched.popleft(), reporter)
        return told

    def _report_one(self, result: IterationResult, reporter: Reporter) -> Told:
        """Report an iteration, and stop if training diverged."""
        told = reporter.iteration(result)
        reporter.skipped_images(result.iteration, self.skipped_images.take_new())
        gave_up = self.loss_scaler is not None and self.loss_scaler.is_exhausted
        epoch = self.schedules.epoch_at(result.iteration + 1)
        self.recovery.see(told.loss, result.iteration, epoch)
        self.divergence.see(told.loss, result.iteration, epoch, gave_up)
        return told

    def _evaluate(self, iteration: int, reporter: Reporter) -> bool:
        """Top-1 over all evaluation images, BatchNorm statistics averaged over the ranks; whether it is the best."""
        self._watchdog.activity = "evaluation"
        loss, self.top1, top5 = self.evaluate()
        self._watchdog.activity = "training"
        is_best = self.top1 > self.best_top1
        self.best_top1 = max(self.best_top1, self.top1)
        reporter.skipped_images(iteration, self.skipped_images.take_new())
        reporter.evaluation(iteration, loss, self.top1, top5)
        if reporter.wants_spectra:
            reporter.spectra(iteration, self.optimizer.spectra())
        return is_best

    def _batches(self) -> Iterator[Batch]:
        rank, size = self.communicator.rank, self.communicator.size
        return self.dataset.train_batches(self.sampler, rank, size, self.iteration, self.schedules.num_iterations)

    def _log_start(self) -> None:
        logger.info(
            "%d training and %d test images, %d classes; %d iterations of %d images: %d slots of %d a rank",
            self.dataset.num_train, self.dataset.num_eval, self.dataset.num_classes, self.schedules.num_iterations,
            self.sampler.global_size, self.num_local_slots, self.sampler.per_slot,
        )  # fmt: skip
        for warning in warnings_of(self.config, self.dataset.num_train):
            logger.warning("warning: %s", warning)
        for line in self.optimizer.describe():
            logger.info("%s", line)

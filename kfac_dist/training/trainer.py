"""The training loop: slots, schedules, evaluation and metrics around an optimizer that does the rest."""

import logging
import math
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import Communicator, library_version
from kfac_dist.config.load import batch_slots
from kfac_dist.config.schema import Config
from kfac_dist.curvature.blocks.base import FactorKey
from kfac_dist.data.augment import RandomErasing, RunningMixup, soft_labels
from kfac_dist.data.create import create_dataset
from kfac_dist.data.imagenet.image_file import ImageError
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.skipped import SkippedImages
from kfac_dist.errors import TrainingFailed
from kfac_dist.models import SlotwiseBatchNorm, create_model
from kfac_dist.optim.kfac import KFAC
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.precision import Precision, configure_backends
from kfac_dist.random_streams import RandomStream, keyed_generator
from kfac_dist.runs.environment import describe_environment
from kfac_dist.runs.progress import Progress
from kfac_dist.runs.writer import RunWriter, choose_run_directory
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.tensors.host_copy import HostCopy, to_device
from kfac_dist.timing import StageSeconds, StageTimer
from kfac_dist.training.build import create_optimizer
from kfac_dist.training.evaluation import evaluate
from kfac_dist.training.schedules import LearningRateSchedule, coupled_momentum, damping_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended: final test accuracy in percent, and where its files are."""

    top1: float
    iterations: int
    seconds: float
    directory: Path


@dataclass(frozen=True)
class _Iteration:
    """An update that was launched, and what is to be reported of it."""

    iteration: int
    settings: dict[str, float]
    averages: HostCopy
    stages: StageSeconds
    communication_bytes: int
    is_skipped: bool
    changes: dict[FactorKey, float]


class Trainer:
    """One run of a configuration on all ranks of a communicator."""

    def __init__(self, config: Config, communicator: Communicator, device: torch.device) -> None:
        """Read the data and build network and optimizer; collective.

        Args:
            config: A validated configuration.
            communicator: Collectives over the ranks.
            device: Where this rank computes.

        Raises:
            InputError: If the data, the model or the batch do not fit; the same on every rank.
        """
        self.config = config
        self.communicator = communicator
        self.device = device
        self.precision = Precision(config.train.precision)
        dtype = self.precision.weights
        seed = config.run.seed
        configure_backends(config.run.deterministic)
        with communicator.raise_on_all_ranks():
            self.num_local_slots = batch_slots(config, communicator.size)
            self.dataset = create_dataset(config.data, config.augment, self.device, dtype, seed)
            model = create_model(
                config.model.name, self.dataset.num_classes, self.dataset.image_shape, seed,
                config.model.variant, config.model.zero_init_last_gamma,
            )  # fmt: skip
            self.batchnorm = SlotwiseBatchNorm(model)
        self.skipped_images = SkippedImages(self.dataset, communicator)
        self.model: nn.Module = model.to(self.device, dtype).to(memory_format=self._memory_format())
        self.sampler = SlotSampler(
            self.dataset.num_train, config.batch.per_rank, config.batch.global_size // config.batch.per_rank, seed
        )
        self.num_iterations = self.sampler.num_iterations(config.train.epochs)
        self.timer = StageTimer.on(self.device)
        self.loss_scaler = LossScaler() if self.precision.needs_loss_scale else None
        with communicator.raise_on_all_ranks():
            self.optimizer = create_optimizer(
                config, self.model, communicator, self.num_local_slots, self.sampler.epoch_at, self.timer,
                self.loss_scaler,
            )  # fmt: skip
        self.learning_rate = LearningRateSchedule.from_config(config.schedule, config.optimizer.learning_rate)
        self.mixup = RunningMixup(config.augment.mixup_alpha, seed)
        erasing = config.augment.erasing
        self.erasing = RandomErasing(erasing.probability, erasing.area, erasing.aspect, seed) if erasing else None

    def train(self) -> Result:
        """Train to the end; collective.

        Raises:
            TrainingFailed: If the loss is no longer finite, or images are damaged.
        """
        start = time.perf_counter()
        self._log_start()
        with self.communicator.raise_on_all_ranks():
            progress = Progress(self.num_iterations, self.communicator.is_main)
        with closing(self._create_writer()) as writer, closing(progress):
            batches = self._batches()
            best = top1 = 0.0
            self._reported_at = time.perf_counter()  # the last iteration, for images a second
            queued: _Iteration | None = None
            for iteration in range(self.num_iterations):
                launched = self._train_iteration(iteration, batches)
                if queued is not None:
                    self._report(queued, writer, progress)
                queued = launched
                evaluates = self._evaluation_is_due(iteration)
                if evaluates or self.device.type == "cpu":  # a GPU goes on while the host looks at the one before
                    self._report(queued, writer, progress)
                    queued = None
                if evaluates:
                    top1 = self._evaluate(iteration, writer, progress)
                    best = max(best, top1)
            seconds = time.perf_counter() - start
            writer.write(
                "summary", top1=top1, best_top1=best, iterations=self.num_iterations, seconds=seconds,
                communication_bytes=self.communicator.payload_bytes, skipped_pictures=len(self.skipped_images.skipped),
                skipped_updates=self.num_skipped_updates,
            )  # fmt: skip
            writer.finish()
        return Result(top1, self.num_iterations, seconds, writer.directory)

    # One iteration ------------------------------------------------------------------------------------

    def _train_iteration(self, iteration: int, batches: Iterator[tuple[Tensor, Tensor]]) -> "_Iteration":
        """One update. On a GPU it is queued rather than done when this returns: `_Iteration.read` waits for it."""
        bytes_before = self.communicator.payload_bytes
        settings = self._apply_schedules(iteration)
        self.model.train()
        self.optimizer.zero_grad()
        saved = self._copy_of_running_statistics()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        problem = ""
        try:
            for index, slot in enumerate(self.sampler.local_slots(self.communicator.rank, self.communicator.size)):
                self.batchnorm.before_slot(index, self.num_local_slots)
                sums += self._train_slot(iteration, slot, batches)
        except ImageError as error:  # this rank's alone, until the others know
            problem = str(error)
        self.skipped_images.gather_and_check(problem)
        overflows_before = self.num_skipped_updates
        self.optimizer.step()
        is_skipped = self.num_skipped_updates > overflows_before
        if is_skipped:  # an overflow in the forward pass has spoilt these, too
            copy_all_(self.batchnorm.running_buffers(), saved)
        return _Iteration(
            iteration, settings, self._start_averaging(sums), self.timer.snapshot(),
            self.communicator.payload_bytes - bytes_before, is_skipped,
            dict(self.optimizer.changes) if isinstance(self.optimizer, KFAC) else {},
        )  # fmt: skip

    def _copy_of_running_statistics(self) -> list[Tensor]:
        """BatchNorm's running statistics, to go back to if the update is skipped; empty where none ever is."""
        if self.loss_scaler is None:
            return []
        return [buffer.clone() for buffer in self.batchnorm.running_buffers()]

    def _start_averaging(self, sums: Tensor) -> HostCopy:
        """Loss and share of correct answers over the global batch, and all ranks' retries, on their way to the host."""
        counts = torch.zeros(2, dtype=torch.float64)
        if isinstance(self.optimizer, KFAC):
            counts = torch.tensor([self.optimizer.num_retries, self.optimizer.num_kept_inverses], dtype=torch.float64)
            self.optimizer.num_retries = self.optimizer.num_kept_inverses = 0
        num_slots = self.num_local_slots * self.communicator.size
        values = torch.cat([sums / num_slots, to_device(counts, self.device)])
        return HostCopy(self.communicator.all_reduce_(values))

    def _report(self, done: "_Iteration", writer: RunWriter, progress: Progress) -> None:
        """Write what came of an iteration, and stop if training diverged."""
        loss, correct, retries, kept = done.averages.read().tolist()
        iteration, top1 = done.iteration, 100 * correct
        epoch = self.sampler.epoch_at(iteration + 1)
        now = time.perf_counter()
        images_per_second, self._reported_at = self.sampler.global_size / (now - self._reported_at), now
        writer.write(
            "train", iteration=iteration, epoch=epoch, loss=loss, top1=top1, **done.settings,
            images_per_second=images_per_second, stage_seconds=done.stages.read(),
            communication_bytes=done.communication_bytes,
        )  # fmt: skip
        if retries:
            writer.write("event", iteration=iteration, event="retry", retries=int(retries), kept_inverses=int(kept))
        self._report_changes(done, writer)
        self._report_skipped_images(iteration, writer, progress)
        if done.is_skipped:
            writer.write("event", iteration=iteration, event="overflow", loss_scale=done.settings["loss_scale"])
        gave_up = self.loss_scaler is not None and self.loss_scaler.is_exhausted
        if gave_up or not (math.isfinite(loss) or done.is_skipped):
            raise TrainingFailed(
                f"the training loss is {loss} at iteration {iteration} (epoch {epoch:.2f}"
                f"{'; it overflows fp16 even without a loss scale' if gave_up else ''}): training diverged. Lower "
                f"optimizer.learning_rate, raise the damping, or keep a running average (kfac.ema_decay)"
            )
        progress.update(epoch, loss, top1, images_per_second)

    def _train_slot(self, iteration: int, slot: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Forward and backward of one micro-batch; returns its mean loss and share of correct answers."""
        with self.timer.stage("data"):
            images, labels = next(batches)
            targets = soft_labels(labels, self.dataset.num_classes, images.dtype)
            images, targets = self.mixup.mix(images, targets, iteration, slot)
            if self.erasing is not None:
                images = self.erasing.apply(images, iteration, slot)
        # Dropout draws from torch's generator: key that too, so that a slot is the same on any rank.
        torch.manual_seed(
            int(keyed_generator(self.config.run.seed, RandomStream.TORCH, iteration, slot).integers(2**63))
        )
        images = images.to(memory_format=self._memory_format())
        with self.timer.stage("forward"), self.precision.autocast(self.device):
            logits = self.model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.train.label_smoothing)
        with self.timer.stage("backward"):
            scaled = loss / self.num_local_slots
            (scaled if self.loss_scaler is None else self.loss_scaler.scale_loss(scaled)).backward()
        correct = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).double().mean()
        return torch.stack([loss.detach().double(), correct])

    def _apply_schedules(self, iteration: int) -> dict[str, float]:
        """Set this iteration's learning rate, momentum and damping; returns them for the metrics."""
        config = self.config
        learning_rate = self.learning_rate.at(self.sampler.epoch_at(iteration))
        settings = {"learning_rate": learning_rate, "momentum": config.optimizer.momentum, "damping": 0.0}
        if config.kfac is not None:
            initial = config.optimizer.learning_rate
            settings["momentum"] = coupled_momentum(learning_rate, initial, config.optimizer.momentum)
            damping = config.kfac.damping
            settings["damping"] = damping_at(iteration, damping.initial, damping.target, damping.warmup_steps)
        if self.loss_scaler is not None:
            settings["loss_scale"] = self.loss_scaler.scale
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["momentum"] = settings["momentum"]
            group["damping"] = settings["damping"]
        return settings

    def _report_changes(self, done: "_Iteration", writer: RunWriter) -> None:
        """Diff (Eq. 19) of the matrices that an iteration refreshed; the first refresh of each has none."""
        if self.config.kfac is None or not self.config.kfac.monitor.diff:
            return
        for (layer, matrix), change in done.changes.items():
            if math.isfinite(change):
                writer.write("fisher", iteration=done.iteration, layer=layer, matrix=matrix, diff=change)

    def _report_spectra(self, iteration: int, writer: RunWriter) -> None:
        """Eigenvalue range and effective rank of the running Fisher, where asked for."""
        if self.config.kfac is None or not self.config.kfac.monitor.spectrum or not isinstance(self.optimizer, KFAC):
            return
        for (layer, matrix), (smallest, largest, rank) in self.optimizer.spectra().items():
            writer.write(
                "fisher", iteration=iteration, layer=layer, matrix=matrix,
                smallest_eigenvalue=smallest, largest_eigenvalue=largest, effective_rank=rank,
            )  # fmt: skip

    def _report_skipped_images(self, iteration: int, writer: RunWriter, progress: Progress) -> None:
        """Note the images that some rank has skipped for the first time."""
        for problem in self.skipped_images.take_new():
            writer.write("event", iteration=iteration, event="skipped_picture", problem=problem)
            progress.say(f"skipped: {problem}")

    @property
    def num_skipped_updates(self) -> int:
        """Updates that an overflow in fp16 has cost so far."""
        return self.loss_scaler.num_overflows if self.loss_scaler is not None else 0

    def _memory_format(self) -> torch.memory_format:
        """Tensor Cores convolve images whose channels lie together; a CPU is faster the other way."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = self.communicator.rank, self.communicator.size
        return self.dataset.train_batches(self.sampler, rank, size, 0, self.num_iterations)

    # Evaluation ---------------------------------------------------------------------------------------

    def _evaluation_is_due(self, iteration: int) -> bool:
        every = self.config.train.evaluate_every
        before, after = self.sampler.epoch_at(iteration) / every, self.sampler.epoch_at(iteration + 1) / every
        return math.floor(after) > math.floor(before) or iteration == self.num_iterations - 1

    def _evaluate(self, iteration: int, writer: RunWriter, progress: Progress) -> float:
        """Top-1 in percent over all evaluation images, with BatchNorm statistics averaged over the ranks."""
        for buffer in self.batchnorm.running_buffers():
            self.communicator.all_reduce_(buffer, "mean")
        with self.precision.autocast(self.device):
            loss, top1, top5 = evaluate(self.model, self.dataset, self.communicator, self.skipped_images)
        self._report_skipped_images(iteration, writer, progress)
        epoch = self.sampler.epoch_at(iteration + 1)
        writer.write("eval", iteration=iteration, epoch=epoch, loss=loss, top1=top1, top5=top5)
        self._report_spectra(iteration, writer)
        self._reported_at = time.perf_counter()
        progress.say(f"epoch {epoch:.2f}: test loss {loss:.4f}, top-1 {top1:.2f} %")
        return top1

    # Start --------------------------------------------------------------------------------------------

    def _create_writer(self) -> RunWriter:
        """Open the run's directory; rank 0 chooses it."""
        config = self.config
        with self.communicator.raise_on_all_ranks():
            chosen = choose_run_directory(config.run.output_dir, config.run.name)
        directory = Path(self.communicator.gather_bytes(str(chosen).encode())[0].decode())
        hosts = [name.decode() for name in self.communicator.gather_bytes(socket.gethostname().encode())]
        environment = describe_environment(library_version(), hosts)
        with self.communicator.raise_on_all_ranks():
            return RunWriter(directory, self.communicator.is_main, config.to_yaml(), environment)

    def _log_start(self) -> None:
        logger.info(
            "%d training and %d test images, %d classes; %d iterations of %d images: %d slots of %d a rank",
            self.dataset.num_train, self.dataset.num_eval, self.dataset.num_classes, self.num_iterations,
            self.sampler.global_size, self.num_local_slots, self.sampler.per_slot,
        )  # fmt: skip
        if isinstance(self.optimizer, KFAC):
            covered = len(self.optimizer.blocks) - len(self.optimizer.uncovered)
            logger.info("K-FAC covers %d layers", covered)
            for block in self.optimizer.uncovered:
                logger.info("plain gradient for %s (%d values): %s", block.name, block.num_values, block.reason)

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

from kfac_dist.augment import Purpose, RandomErasing, RunningMixup, keyed_generator, soft_labels
from kfac_dist.communicator import Communicator, library_version
from kfac_dist.config import Config, batch_slots
from kfac_dist.data import Dataset, SlotSampler, create_dataset
from kfac_dist.data.damage import DamagedPictures
from kfac_dist.data.pictures import PictureError
from kfac_dist.environment import describe_environment
from kfac_dist.errors import InputError, TrainingFailed
from kfac_dist.metrics import Progress, RunWriter, choose_run_directory
from kfac_dist.models import SlotwiseBatchNorm, create_model
from kfac_dist.optimizer import KFAC
from kfac_dist.optimizers import create_optimizer
from kfac_dist.schedules import LearningRateSchedule, coupled_momentum, damping_at
from kfac_dist.timing import StageTimer

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
_EVAL_BATCH = 500
_EVAL_PIXELS = 2**22  # of a batch: 83 images of 224x224


@dataclass(frozen=True)
class Result:
    """How a run ended: final test accuracy in percent, and where its files are."""

    top1: float
    iterations: int
    seconds: float
    directory: Path


class Trainer:
    """One run of a configuration on all ranks of a communicator."""

    def __init__(self, config: Config, communicator: Communicator) -> None:
        """Read the data and build network and optimizer; collective.

        Raises:
            InputError: If the data, the model or the batch do not fit; the same on every rank.
        """
        self.config = config
        self.communicator = communicator
        with communicator.agree():
            self.device = choose_device(config.run.device, communicator.local_rank)
        dtype = _DTYPES[config.train.precision]
        seed = config.run.seed
        with communicator.agree():
            self.num_local_slots = batch_slots(config, communicator.size)
            self.dataset = create_dataset(config.data, config.augment, self.device, dtype, seed)
            model = create_model(
                config.model.name, self.dataset.num_classes, self.dataset.image_shape, seed,
                config.model.variant, config.model.zero_init_last_gamma,
            )  # fmt: skip
            self.batchnorm = SlotwiseBatchNorm(model)
        self.damaged = DamagedPictures(self.dataset, communicator)
        self.model: nn.Module = model.to(self.device, dtype)
        self.sampler = SlotSampler(
            self.dataset.num_train, config.batch.per_rank, config.batch.global_size // config.batch.per_rank, seed
        )
        self.num_iterations = self.sampler.num_iterations(config.train.epochs)
        self.timer = StageTimer()
        with communicator.agree():
            self.optimizer = create_optimizer(
                config, self.model, communicator, self.num_local_slots, self.sampler.epoch_at, self.timer
            )
        self.learning_rate = LearningRateSchedule.from_config(config.schedule, config.optimizer.learning_rate)
        self.mixup = RunningMixup(config.augment.mixup_alpha, seed)
        erasing = config.augment.erasing
        self.erasing = RandomErasing(erasing.probability, erasing.area, erasing.aspect, seed) if erasing else None

    def train(self) -> Result:
        """Train to the end; collective.

        Raises:
            TrainingFailed: If the loss is no longer finite, or pictures are damaged.
        """
        start = time.perf_counter()
        self._log_start()
        with self.communicator.agree():
            progress = Progress(self.num_iterations, self.communicator.is_main)
        with closing(self._create_writer()) as writer, closing(progress):
            batches = self._batches()
            best = top1 = 0.0
            for iteration in range(self.num_iterations):
                self._train_iteration(iteration, batches, writer, progress)
                if self._evaluation_is_due(iteration):
                    top1 = self._evaluate(iteration, writer, progress)
                    best = max(best, top1)
            seconds = time.perf_counter() - start
            writer.write(
                "summary", top1=top1, best_top1=best, iterations=self.num_iterations, seconds=seconds,
                communication_bytes=self.communicator.payload_bytes, skipped_pictures=len(self.damaged.skipped),
            )  # fmt: skip
            writer.finish()
        return Result(top1, self.num_iterations, seconds, writer.directory)

    # One iteration ------------------------------------------------------------------------------------

    def _train_iteration(
        self, iteration: int, batches: Iterator[tuple[Tensor, Tensor]], writer: RunWriter, progress: Progress
    ) -> None:
        start = time.perf_counter()
        bytes_before = self.communicator.payload_bytes
        settings = self._apply_schedules(iteration)
        self.model.train()
        self.optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        problem = ""
        try:
            for index, slot in enumerate(self.sampler.local_slots(self.communicator.rank, self.communicator.size)):
                self.batchnorm.before_slot(index, self.num_local_slots)
                sums += self._train_slot(iteration, slot, batches)
        except PictureError as error:  # this rank's alone, until the others know
            problem = str(error)
        self.damaged.agree(problem)
        self.optimizer.step()

        loss, top1 = self._mean_over_slots(sums)
        epoch = self.sampler.epoch_at(iteration + 1)
        images_per_second = self.sampler.global_size / (time.perf_counter() - start)
        writer.write(
            "train", iteration=iteration, epoch=epoch, loss=loss, top1=top1, **settings,
            images_per_second=images_per_second, stage_seconds=self.timer.take(),
            communication_bytes=self.communicator.payload_bytes - bytes_before,
        )  # fmt: skip
        self._report_retries(iteration, writer)
        self._report_changes(iteration, writer)
        self._report_damaged(iteration, writer, progress)
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the training loss is {loss} at iteration {iteration} (epoch {epoch:.2f}): training diverged. Lower "
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
        torch.manual_seed(int(keyed_generator(self.config.run.seed, Purpose.TORCH, iteration, slot).integers(2**63)))
        with self.timer.stage("forward"):
            logits = self.model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.train.label_smoothing)
        with self.timer.stage("backward"):
            (loss / self.num_local_slots).backward()
        correct = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).double().mean()
        return torch.stack([loss.detach().double(), correct])

    def _mean_over_slots(self, sums: Tensor) -> tuple[float, float]:
        """Loss and top-1 in percent of the global batch."""
        means = self.communicator.all_reduce_(sums.cpu() / self.num_local_slots, "mean")
        loss, correct = means.tolist()
        return loss, 100 * correct

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
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["momentum"] = settings["momentum"]
            group["damping"] = settings["damping"]
        return settings

    def _report_retries(self, iteration: int, writer: RunWriter) -> None:
        """Note factorisations that needed more damping, on whichever rank."""
        if not isinstance(self.optimizer, KFAC):
            return
        counts = torch.tensor([self.optimizer.num_retries, self.optimizer.num_kept_inverses], dtype=torch.float64)
        retries, kept = map(int, self.communicator.all_reduce_(counts).tolist())
        self.optimizer.num_retries = self.optimizer.num_kept_inverses = 0
        if retries:
            writer.write("event", iteration=iteration, event="retry", retries=retries, kept_inverses=kept)

    def _report_changes(self, iteration: int, writer: RunWriter) -> None:
        """Diff (Eq. 19) of the matrices that this iteration refreshed; the first refresh of each has none."""
        if self.config.kfac is None or not self.config.kfac.monitor.diff or not isinstance(self.optimizer, KFAC):
            return
        for (layer, matrix), change in self.optimizer.changes.items():
            if math.isfinite(change):
                writer.write("fisher", iteration=iteration, layer=layer, matrix=matrix, diff=change)

    def _report_spectra(self, iteration: int, writer: RunWriter) -> None:
        """Eigenvalue range and effective rank of the running Fisher, where asked for."""
        if self.config.kfac is None or not self.config.kfac.monitor.spectrum or not isinstance(self.optimizer, KFAC):
            return
        for (layer, matrix), (smallest, largest, rank) in self.optimizer.spectra().items():
            writer.write(
                "fisher", iteration=iteration, layer=layer, matrix=matrix,
                smallest_eigenvalue=smallest, largest_eigenvalue=largest, effective_rank=rank,
            )  # fmt: skip

    def _report_damaged(self, iteration: int, writer: RunWriter, progress: Progress) -> None:
        """Note the pictures that some rank has skipped for the first time."""
        for problem in self.damaged.take_new():
            writer.write("event", iteration=iteration, event="skipped_picture", problem=problem)
            progress.say(f"skipped: {problem}")

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
        loss, top1, top5 = evaluate(self.model, self.dataset, self.communicator, self.damaged)
        self._report_damaged(iteration, writer, progress)
        epoch = self.sampler.epoch_at(iteration + 1)
        writer.write("eval", iteration=iteration, epoch=epoch, loss=loss, top1=top1, top5=top5)
        self._report_spectra(iteration, writer)
        progress.say(f"epoch {epoch:.2f}: test loss {loss:.4f}, top-1 {top1:.2f} %")
        return top1

    # Start --------------------------------------------------------------------------------------------

    def _create_writer(self) -> RunWriter:
        """Open the run's directory; rank 0 chooses it."""
        config = self.config
        with self.communicator.agree():
            chosen = choose_run_directory(config.run.output_dir, config.run.name)
        directory = Path(self.communicator.gather_bytes(str(chosen).encode())[0].decode())
        hosts = [name.decode() for name in self.communicator.gather_bytes(socket.gethostname().encode())]
        environment = describe_environment(library_version(), hosts)
        with self.communicator.agree():
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


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, communicator: Communicator, damaged: DamagedPictures
) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent over all evaluation images; collective.

    Every image counts once, however the images divide over the ranks; a rank may have none.

    Raises:
        TrainingFailed: On every rank, if pictures are damaged.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    batch_size = max(1, min(_EVAL_BATCH, _EVAL_PIXELS // math.prod(dataset.image_shape[1:])))
    problem = ""
    try:
        for images, labels in dataset.eval_batches(communicator.rank, communicator.size, batch_size):
            logits = model(images)
            ranked = logits.topk(min(5, dataset.num_classes), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[0] += loss.double().cpu()
            sums[1] += ranked[:, 0].sum().cpu()
            sums[2] += ranked.any(dim=1).sum().cpu()
            sums[3] += len(labels)
    except PictureError as error:  # this rank's alone, until the others know
        problem = str(error)
    damaged.agree(problem)
    loss_sum, top1, top5, count = communicator.all_reduce_(sums).tolist()
    return loss_sum / count, 100 * top1 / count, 100 * top5 / count


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank: its own GPU where there are any, unless the configuration says otherwise.

    Raises:
        InputError: If a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device must be cpu or auto on a machine without a CUDA device that torch sees, got cuda")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device

"""What learns: data, network and optimizer of a run on this rank, and one iteration with them."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import Communicator
from kfac_dist.communicator.coalesced import mean_over_ranks
from kfac_dist.config.load import batch_slots
from kfac_dist.config.schema import Config
from kfac_dist.data.augment import Augmentation
from kfac_dist.data.base import Batch
from kfac_dist.data.create import create_dataset
from kfac_dist.data.random_streams import RandomStream, keyed_generator
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.skipped import SkippedImages
from kfac_dist.errors import ImageError
from kfac_dist.models import SlotwiseBatchNorm, create_model
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.tensors.host_copy import HostCopy, to_device
from kfac_dist.timing import StageTimer
from kfac_dist.training.agreement import check_ranks_agree
from kfac_dist.training.black_box import BlackBox
from kfac_dist.training.build import Parts, create_optimizer
from kfac_dist.training.evaluation import evaluate
from kfac_dist.training.precision import Precision, configure_backends
from kfac_dist.training.pretrained import load_pretrained
from kfac_dist.training.recovery import Recovery
from kfac_dist.training.reporter import IterationResult
from kfac_dist.training.schedules import Schedules

logger = logging.getLogger(__name__)


Wishes = Callable[[], tuple[bool, bool]]
"""Asks whether this rank wants to save, and to stop, after the iteration."""


class Learner:
    """The parts of a run, and one iteration with them; what all iterations make of it is the `Trainer`'s.

    for each of this rank's slots: augment → forward → backward      stages 1 and 2
    optimizer.step()                                                 stages 3 to 6
    """

    def __init__(self, config: Config, communicator: Communicator, device: torch.device) -> None:
        """Read the data and build network and optimizer; collective.

        Args:
            config: A validated configuration.
            communicator: Collectives over the ranks.
            device: Where this rank computes.

        Raises:
            InputError: If the data, the model or the batch do not fit; the same on every rank.
        """
        self.config, self.communicator, self.device = config, communicator, device
        self.precision = Precision(config.train.precision)
        dtype, seed, batch = self.precision.weights, config.run.seed, config.batch
        # Tensor Cores convolve images whose channels lie together; a CPU is faster the other way.
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        configure_backends(config.run.deterministic)
        with communicator.raise_on_all_ranks():
            self.num_local_slots = batch_slots(config, communicator.size)
            self.dataset = create_dataset(config.data, config.augment, device, dtype, seed, communicator)
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
        needs_scale = self.precision.needs_loss_scale
        self.loss_scaler = LossScaler(num_losses=self.num_local_slots) if needs_scale else None
        with communicator.raise_on_all_ranks():
            self.schedules = Schedules(config, self.sampler)
            parts = Parts(self.model, communicator, self.num_local_slots, self.schedules, self.timer, self.loss_scaler)
            self.optimizer = create_optimizer(config, parts)
        self.augmentation = Augmentation(config.augment, self.dataset.num_classes, seed)
        self.recovery = Recovery(config.train.max_nonfinite, config.train.max_restores)
        self.black_box = BlackBox(self.model, communicator, self.sampler)
        self.iteration = 0  # the next one
        self._retries = (0, 0)  # of the last update, not yet told

    def _train_iteration(self, iteration: int, batches: Iterator[Batch], wishes: Wishes) -> IterationResult:
        """One update. On a GPU it is queued rather than done when this returns.

        Args:
            iteration: Its number.
            batches: Of this rank, from this iteration on.
            wishes: What this rank wants to be done after it.
        """
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
                of_slot = self._train_slot(batches, is_last=index == self.num_local_slots - 1)
                losses.append(of_slot[0])
                sums += of_slot
        except ImageError as error:  # this rank's alone, until the others know
            problem = str(error)
            with self.optimizer.overlap_backward():
                pass  # what the other ranks send they send to this one, too
        self.skipped_images.gather_and_check(problem)
        self.black_box.record(iteration, settings, losses)
        totals = self._total(sums, wishes)
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
        stages = self.timer.snapshot()
        return IterationResult(iteration, settings, loss_scale, totals, stages, moved, step, time.perf_counter())

    def _total(self, sums: Tensor, wishes: Wishes) -> HostCopy:
        """`Totals` of an iteration; `sums` are those of its losses and shares of correct answers here."""
        counts = torch.tensor([*self._retries, *wishes()], dtype=torch.float64)
        self._retries = (0, 0)
        means = sums / (self.num_local_slots * self.communicator.size)
        return HostCopy(self.communicator.all_reduce_(torch.cat([means, to_device(counts, self.device)])))

    def _train_slot(self, batches: Iterator[Batch], is_last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns its mean loss and share of correct answers.

        Args:
            batches: Gives it.
            is_last: Whether this rank has no further one in this iteration.
        """
        with self.timer.stage("data"):
            batch = self.augmentation.apply(next(batches))
        # Dropout draws from torch's generator: key that too, so that a slot is the same on any rank.
        generator = keyed_generator(self.config.run.seed, RandomStream.TORCH, batch.iteration, batch.slot)
        torch.manual_seed(int(generator.integers(2**63)))
        images = batch.images.to(memory_format=self.memory_format)
        with self.timer.stage("forward"), self.precision.autocast(self.device):
            logits = self.model(images)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.train.label_smoothing)
        sending = self.optimizer.overlap_backward() if is_last else nullcontext()
        with self.timer.stage("backward"), sending:
            scaled = loss / self.num_local_slots
            (scaled if self.loss_scaler is None else self.loss_scaler.scale_loss(scaled)).backward()
        correct = (logits.detach().argmax(dim=1) == batch.labels.argmax(dim=1)).double().mean()
        return torch.stack([loss.detach().double(), correct])

    def evaluate(self, beat: Callable[[], None] = lambda: None) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 in percent over all evaluation images; collective.

        Args:
            beat: Called after each batch.
        """
        self.batchnorm.restore(mean_over_ranks(self.communicator, self.batchnorm.running_buffers()))
        with self.precision.autocast(self.device):
            return evaluate(self.model, self.dataset, self.communicator, self.skipped_images, beat)

    def _batches(self) -> Iterator[Batch]:
        rank, size = self.communicator.rank, self.communicator.size
        return self.dataset.train_batches(self.sampler, rank, size, self.iteration, self.schedules.num_iterations)

"""Seconds of an iteration and memory of a rank, on any number of ranks, before there are any.

The work is that of the program's own code (`work.py`), shared out by its own assignment, sent in its own buffers and
refreshed by its own schedule; a `Profile` says how fast a machine does it. As in `KFAC`, nothing overlaps but the
gradients' ReduceScatterV, with the backward pass of a rank's last slot and then with stage 4, and that over NCCL only:
over MPI a collective is complete when it was started.
The data are taken to be there when they are wanted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kfac_dist.config.kfac import RefreshConfig
from kfac_dist.config.load import batch_slots
from kfac_dist.config.schema import BatchConfig, Config
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import block_cost, create_blocks
from kfac_dist.data.create import describe_dataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.models import create_model
from kfac_dist.optim.buffers import StageBuffers, all_factor_keys
from kfac_dist.optim.gradient_messages import cut_for_backward
from kfac_dist.planning.memory import largest_unfolding, rank_memory
from kfac_dist.planning.network import Fabric
from kfac_dist.planning.operations import Operations
from kfac_dist.planning.profile import Profile
from kfac_dist.planning.refresh_shares import refresh_shares
from kfac_dist.planning.work import OwnedWorks, Refresh, SlotWork, copy_work, slot_work, update_work
from kfac_dist.tensors.encoding import encoded_bytes
from kfac_dist.tensors.packing import FlatBuffer
from kfac_dist.training.build import create_refresh
from kfac_dist.training.precision import HALF_DTYPES
from kfac_dist.training.schedules import Schedules

PLAN_STAGES = (
    "forward",
    "backward",
    "factors",
    "reduce_scatter",
    "inverse",
    "precondition",
    "all_gather",
    "update",
)
"""The stages of Algorithm 1, with the construction of factors, which is within backward, apart."""

_AGREEMENTS = 2  # small all-reduces of an iteration: what the ranks have (`agree_on_step`), and their loss
_HALF = ("fp16", "bf16")


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take on a number of ranks.

    Attributes:
        num_ranks: P.
        slots: Micro-batches of a rank in an iteration.
        batch: Of the iteration, over all ranks.
        stages: Seconds of each of `PLAN_STAGES` in an iteration, the mean over the run.
        refresh_seconds: An iteration that refreshes everything.
        stale_seconds: One that refreshes nothing.
        refresh_interval: Iterations for each refresh, by the mean over the run; infinite without K-FAC.
        sgd_seconds: An iteration of SGD on the same ranks and batch, its gradients all-reduced.
        memory: Bytes on the rank that has the most: "weights", "activations", "fisher", "unfolding" and "factorising",
            which is what stage 4 takes beyond that of the activations, which are gone by then.
        num_iterations: Of the run.
    """

    num_ranks: int
    slots: int
    batch: int
    stages: Mapping[str, float]
    refresh_seconds: float
    stale_seconds: float
    refresh_interval: float
    sgd_seconds: float
    memory: Mapping[str, int]
    num_iterations: int

    @property
    def seconds(self) -> float:
        """Of an iteration, the mean over the run."""
        return sum(self.stages.values())

    @property
    def hours(self) -> float:
        """Of the run's iterations; evaluation and checkpoints come on top."""
        return self.seconds * self.num_iterations / 3600

    @property
    def memory_bytes(self) -> int:
        """All of `memory`."""
        return sum(self.memory.values())


class Simulation:
    """A configuration on a machine."""

    def __init__(self, config: Config, profile: Profile) -> None:
        """Build the network once.

        Args:
            config: A validated configuration.
            profile: The machine.

        Raises:
            InputError: If there is no such model, or it does not take the data's images.
        """
        self.config, self.profile = config, profile
        self.data = describe_dataset(config.data)
        model = create_model(
            config.model.name, self.data.num_classes, self.data.image_shape, config.run.seed, config.model.variant,
            config.model.zero_init_last_gamma, config.model.initialization,
        )  # fmt: skip
        self.model = model.to("meta").train()
        self.form = config.kfac.batchnorm if config.kfac is not None else "diagonal"
        self.skip = config.kfac.skip if config.kfac is not None else ()
        self.blocks = create_blocks(self.model, list(self.model.parameters()), self.form, self.skip)
        self.owned_works = OwnedWorks()
        self._slots: dict[int, SlotWork] = {}
        double, half = config.train.precision == "fp64", config.train.precision in _HALF
        self.value_bytes = 8 if double else 4
        self.training_bytes = 2 if half else self.value_bytes
        # A CPU has no product of half-precision inputs with sums in fp32: the factors' code converts them.
        self.factor_bytes = self.training_bytes if profile.device == "cuda" else self.value_bytes

    def shares(self, refresh: RefreshConfig) -> dict[Refresh, float]:
        """Share of the configured run's iterations by what they refresh, under a refresh schedule."""
        schedules = self._schedules(self.config.batch)
        return refresh_shares(create_refresh(refresh, schedules.epoch_at), self.blocks, schedules.num_iterations)

    @cached_property
    def _own_shares(self) -> dict[Refresh, float]:
        kfac = self.config.kfac
        return {Refresh.of((), {}): 1.0} if kfac is None else self.shares(kfac.refresh)

    def predict(
        self, num_ranks: int, batch: BatchConfig | None = None, shares: Mapping[Refresh, float] | None = None
    ) -> Prediction:
        """What the run takes on a number of ranks.

        Args:
            num_ranks: P.
            batch: Another one than the configuration's.
            shares: Of the iterations by what they refresh, from `shares`; by the configuration's schedule if None.

        Raises:
            InputError: If the batch does not divide over the ranks.
        """
        batch, shares = batch or self.config.batch, shares or self._own_shares
        slots = batch_slots(self.config.model_copy(update={"batch": batch}), num_ranks)
        ranks = _Ranks(self, num_ranks, slots, batch.per_rank)
        by_refresh = {refresh: ranks.stages(refresh) for refresh in shares}
        mean = {
            stage: sum(share * by_refresh[refresh][stage] for refresh, share in shares.items()) for stage in PLAN_STAGES
        }
        seconds = {refresh: sum(stages.values()) for refresh, stages in by_refresh.items()}
        kinds = frozenset(matrix for block in self.blocks for matrix in block.factor_shapes)
        refreshed = sum(share * len(refresh.due) / len(kinds) for refresh, share in shares.items()) if kinds else 0
        return Prediction(
            num_ranks=num_ranks,
            slots=slots,
            batch=batch.global_size,
            stages=mean,
            refresh_seconds=max(seconds.values()),
            stale_seconds=min(seconds.values()),
            refresh_interval=1 / refreshed if refreshed else float("inf"),
            sgd_seconds=ranks.sgd_seconds(),
            memory=ranks.memory(),
            num_iterations=self._schedules(batch).num_iterations,
        )

    def slot(self, images: int) -> SlotWork:
        """The work of a slot of so many images."""
        if images not in self._slots:
            data, kfac = self.data, self.config.kfac
            fraction = kfac.sample_fraction if kfac is not None else 1.0
            self._slots[images] = slot_work(
                self.model, self.blocks, data.image_shape, data.num_classes, images, fraction
            )
        return self._slots[images]

    def _schedules(self, batch: BatchConfig) -> Schedules:
        slots = batch.global_size // batch.per_rank
        sampler = SlotSampler(self.data.num_train, batch.per_rank, slots, self.config.run.seed)
        return Schedules(self.config.model_copy(update={"batch": batch}), sampler)


class _Ranks:
    """An iteration of a simulation on a number of ranks, by stages."""

    def __init__(self, simulation: Simulation, num_ranks: int, slots: int, images: int) -> None:
        self._of, self._num_ranks, self._slots, self._images = simulation, num_ranks, slots, images
        self._fabric = Fabric(simulation.profile, num_ranks)
        self._slot = simulation.slot(images)
        blocks = simulation.blocks
        self._owners = assign_owners([block_cost(block) for block in blocks], num_ranks)
        meta = torch.device("meta")
        self._buffers = StageBuffers(blocks, self._owners, num_ranks, torch.float32, meta, self._overlaps)

    def stages(self, refresh: Refresh) -> dict[str, float]:
        """Seconds of each of `PLAN_STAGES` in an iteration that does this; without K-FAC of one of SGD."""
        if self._of.config.kfac is None:
            return self._sgd_stages()
        communication = self._of.config.communication
        gradient_dtype = HALF_DTYPES.get(communication.gradient_precision)
        buffers = self._buffers
        due = [key for key in all_factor_keys(self._of.blocks) if key[1] in refresh.due]
        factors = self._reduce_scatter(buffers.factors(due), HALF_DTYPES.get(communication.factor_precision))
        training, construction = self._training(), self._factors(refresh)
        messages = [self._reduce_scatter(message.buffer, gradient_dtype) for message in buffers.messages]
        gradients = self._beyond(messages, (training["backward"] + construction) / self._slots)
        inverse, precondition = self._slowest_owner(refresh)
        overlapped = min(gradients, inverse) if self._overlaps else 0.0
        updates = self._fabric.v_collective(self._segment_bytes(buffers.updates(), gradient_dtype))
        local = self._seconds(copy_work(buffers))
        return {
            **training,
            "factors": construction,
            "reduce_scatter": self._agreements() + local + factors + gradients - overlapped,
            "inverse": inverse,
            "precondition": precondition,
            "all_gather": updates,
            "update": self._update(),
        }

    def sgd_seconds(self) -> float:
        """An iteration of SGD as torch's DistributedDataParallel has it: all-reduced beside the backward pass."""
        training, half = self._training(), self._halves_of_all_reduces(num_ranks=1)
        gradients = self._beyond([2 * seconds for seconds in half], training["backward"] / self._slots)
        return sum(training.values()) + gradients + self._update()

    def _sgd_stages(self) -> dict[str, float]:
        """Half of the all-reduce is a reduce-scatter, the other half an all-gather, after it."""
        training, half = self._training(), self._halves_of_all_reduces(self._num_ranks)
        return {
            **dict.fromkeys(PLAN_STAGES, 0.0),
            **training,
            "reduce_scatter": self._agreements() + self._beyond(half, training["backward"] / self._slots),
            "all_gather": sum(half),
            "update": self._update(),
        }

    def _halves_of_all_reduces(self, num_ranks: int) -> list[float]:
        """Seconds of half the all-reduce of each message, the messages being cut for so many ranks."""
        dtype = HALF_DTYPES.get(self._of.config.communication.gradient_precision)
        value_bytes = self._of.value_bytes if dtype is None else 2
        num_bytes = [value_bytes * block.num_values for block in self._of.blocks]
        cuts = cut_for_backward(num_bytes, num_ranks, self._overlaps)
        return [self._fabric.all_reduce(sum(num_bytes[number] for number in numbers)) / 2 for numbers in cuts]

    def _beyond(self, messages: Sequence[float], window: float) -> float:
        """Seconds of the messages that a pass of so many seconds, in which they are completed evenly, does not hide."""
        if not self._overlaps:
            return sum(messages)
        done = 0.0
        for number, seconds in enumerate(messages, start=1):
            done = max(done, window * number / len(messages)) + seconds
        return max(0.0, done - window)

    def memory(self) -> dict[str, int]:
        """Bytes by what they hold, of the rank that has the most."""
        of = self._of
        parts = {"weights": 3 * of.value_bytes * self._num_values}  # and gradients and velocities
        parts["activations"] = of.training_bytes * self._slot.activation_values
        if of.config.kfac is None:
            return parts
        fisher = rank_memory(of.model, of.form, self._num_ranks, of.skip)
        kept = fisher.buffers + fisher.largest_running + fisher.largest_solvers
        parts["fisher"] = kept * of.value_bytes // 4 + fisher.largest_tables
        unfolded = largest_unfolding(of.model, of.data.image_shape, self._images)[1]
        parts["unfolding"] = unfolded * of.factor_bytes // 4
        # Stage 4 holds another copy of each matrix: what was received, then what is damped and factorised in its place.
        factorising = fisher.largest_running * of.value_bytes // 4
        parts["factorising"] = max(0, factorising - parts["activations"] - parts["unfolding"])
        dtype = HALF_DTYPES.get(of.config.communication.factor_precision)
        if dtype is not None:  # the largest owner's segment from every rank
            everything = self._buffers.factors(all_factor_keys(of.blocks))
            parts["fisher"] += self._num_ranks * max(self._segment_bytes(everything, dtype))
        return parts

    @property
    def _num_values(self) -> int:
        return sum(block.num_values for block in self._of.blocks)

    @property
    def _overlaps(self) -> bool:
        return self._of.profile.device == "cuda" and self._of.config.communication.backend != "mpi"

    def _training(self) -> dict[str, float]:
        ratio, value_bytes = self._of.profile.training.ratio * self._slots, self._of.training_bytes
        return {
            "forward": ratio * self._seconds(self._slot.forward, value_bytes),
            "backward": ratio * self._seconds(self._slot.backward, value_bytes),
        }

    def _factors(self, refresh: Refresh) -> float:
        value_bytes = self._of.factor_bytes
        seconds = 0.0
        for matrix in refresh.due:
            seconds += self._seconds(self._slot.factors[matrix], value_bytes)
            seconds += (self._slots - 1) * self._seconds(self._slot.further_factors[matrix], value_bytes)
        return self._of.profile.factors.ratio * seconds

    def _slowest_owner(self, refresh: Refresh) -> tuple[float, float]:
        """Seconds of stages 4 and 5 on the rank that takes the longest for both: the others wait for it in stage 6."""
        owned: list[list[Block]] = [[] for _ in range(self._num_ranks)]
        for block, ranks in zip(self._of.blocks, self._owners, strict=True):
            for rank in ranks:
                owned[rank].append(block)
        times = [(0.0, 0.0)]
        for blocks in filter(None, owned):
            work = self._of.owned_works.of(blocks, refresh)
            times.append((self._seconds(work.inverse), self._seconds(work.precondition)))
        return max(times, key=sum)

    def _reduce_scatter(self, buffer: FlatBuffer, dtype: torch.dtype | None) -> float:
        if not buffer.data.numel():
            return 0.0  # nothing is sent
        segments = self._segment_bytes(buffer, dtype)
        return self._fabric.v_collective(segments) if dtype is None else self._fabric.exchange(segments)

    def _segment_bytes(self, buffer: FlatBuffer, dtype: torch.dtype | None) -> list[int]:
        if dtype is None:
            return [self._of.value_bytes * count for count in buffer.counts]
        return [encoded_bytes(numels, dtype) for numels in buffer.part_numels]

    def _agreements(self) -> float:
        return _AGREEMENTS * self._fabric.all_reduce(0)

    def _update(self) -> float:
        return self._seconds(update_work(self._of.model, self._of.config.weight_rescaling))

    def _seconds(self, operations: Operations, value_bytes: int | None = None) -> float:
        """Of a rank that shares its device with others, if there are more than devices."""
        return self._fabric.sharing * self._of.profile.seconds(operations, value_bytes or self._of.value_bytes)

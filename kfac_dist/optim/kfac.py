"""Distributed K-FAC as a `torch.optim.Optimizer`: stages 3 to 6 of Algorithm 1 (CVPR 2019)."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator, Pending
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.create import block_cost, create_blocks, refresh_costs
from kfac_dist.curvature.capture import Capture
from kfac_dist.curvature.inversion import RefreshReport
from kfac_dist.curvature.owned import OwnedFisher
from kfac_dist.curvature.refresh_schedule import IntervalRefresh, RefreshSchedule
from kfac_dist.optim.buffers import StageBuffers, add_weight_decay, all_factor_keys, read_update, update_shares
from kfac_dist.optim.guards import Guarded, broadcast_model, check_arguments, clip_, refuse_sparse
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.step_report import StepReport
from kfac_dist.optim.update import momentum_update_, rescale_weights_, rescaled_weights
from kfac_dist.optim.validation import check, check_choice, check_kfac_group, check_max_norm, check_parameters, is_count
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.tensors.packing import unpack_symmetric
from kfac_dist.timing import StageTimer
from kfac_dist.vocabulary import BatchNormForm, WeightRescaling

_STATE_KEY = "kfac"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommDtypes:
    """Half precision, torch.bfloat16 or torch.float16, in which values are sent; None sends them as they are.

    Attributes:
        factors: Of the Fisher's matrices.
        gradients: Of gradients and preconditioned gradients.
    """

    factors: torch.dtype | None = None
    gradients: torch.dtype | None = None


class KFAC(Guarded):
    """K-FAC whose layers are shared out over the ranks; one rank takes the same path as many.

    Each rank calls `backward` on its own part of the batch; `step` averages gradients and Fisher factors over the
    ranks, so the model needs no DistributedDataParallel. At construction every rank takes rank 0's weights.

    `lr`, `momentum`, `damping`, `batchnorm_damping_ratio`, `weight_decay` and `weight_rescaling` are settings of
    parameter groups and are read at every step, so that learning-rate schedulers work; a layer takes its damping
    from the group of its first parameter.

    Attributes:
        blocks: A block for each layer with parameters, in the model's order.
        owners: For each block the ranks that own it.
        report: What came of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.03,
        momentum: float = 0.9,
        damping: float = 0.03,
        batchnorm_damping_ratio: float = 16.0,
        weight_decay: float = 0.0,
        weight_rescaling: WeightRescaling = "off",
        batchnorm: BatchNormForm = "diagonal",
        ema_decay: float | None = None,
        refresh: RefreshSchedule | int = 1,
        accumulation_steps: int | None = None,
        num_samples: int | None = None,
        max_grad_norm: float | None = None,
        skip: Sequence[str] = (),
        track_changes: bool = False,
        loss_scaler: LossScaler | None = None,
        comm_dtypes: CommDtypes = CommDtypes(),
        timer: StageTimer | None = None,
    ) -> None:
        """Hook the model's layers and share them out; collective.

        Args:
            model: The network, on its device; its Linear, Conv2d and BatchNorm layers are covered.
            communicator: Collectives over the ranks; made by `create_communicator()` if None.
            params: What to train: parameters, named parameters or groups as for any torch optimizer; all of the
                model's if None.
            lr: Learning rate η of Eq. 17.
            momentum: m of Eq. 17; to couple it to the learning rate by Eq. 16, set the groups' value.
            damping: γ of Eq. 12, > 0.
            batchnorm_damping_ratio: ρ_BN: BatchNorm layers are damped with ρ_BN·γ.
            weight_decay: Times the weight, added to the gradient before preconditioning.
            weight_rescaling: Eq. 18 for weights of Linear and convolution layers: "always", "cap" or "off".
            batchnorm: Form of the BatchNorm Fisher: "full", "unit" or "diagonal".
            ema_decay: Share of the old Fisher in its running average; None (the paper) keeps the newest only.
            refresh: Iterations from one refresh of the Fisher to the next, or a schedule from
                `kfac_dist.curvature.refresh_schedule`.
            accumulation_steps: Backward passes for each `step`; each loss is to be divided by their number, as usual.
                They are counted; a number given here is only checked against the count.
            num_samples: N, samples of each backward pass on this rank, for layers whose first dimension is something
                else (sequence first, or the tokens of all sequences in one dimension); the size of the first
                dimension if None. The attribute of this name may be set before each forward.
            max_grad_norm: Norm that the *averaged*, unscaled gradient is clipped to before preconditioning; None does
                not clip.
            skip: Shell-style patterns of module names that get the plain gradient.
            track_changes: Put Diff (Eq. 19) of each refreshed matrix into `report`; an adaptive schedule always does.
            loss_scaler: For fp16, what each loss is scaled with before its backward; `step` unscales by itself, and
                skips the update, on every rank, if anything overflowed on any. None if losses are not scaled.
            comm_dtypes: What factors and gradients travel in between ranks.
            timer: Charged with the stages' seconds.

        Raises:
            TypeError: If something else than a model or a communicator is given for one.
            ValueError: If a setting is out of range, or nothing is to be trained.
        """
        self.communicator = check_arguments("KFAC", model, communicator)
        check_choice("batchnorm", batchnorm, get_args(BatchNormForm))
        check("ema_decay", ema_decay is None or 0 < ema_decay < 1, ema_decay, "in (0, 1) or None")
        check("skip", not isinstance(skip, str), repr(skip), "a list of patterns")
        check_max_norm(max_grad_norm)
        for name, value in (("accumulation_steps", accumulation_steps), ("num_samples", num_samples)):
            check(name, value is None or is_count(value), value, "an integer ≥ 1, or None")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "batchnorm_damping_ratio": batchnorm_damping_ratio,
            "weight_decay": weight_decay,
            "weight_rescaling": weight_rescaling,
        }
        super().__init__(model.named_parameters() if params is None else params, defaults)
        self.accumulation_steps = accumulation_steps
        self.report = StepReport()
        self._refresh = _refresh_schedule(refresh)
        self._track_changes = track_changes or self._refresh.needs_changes
        self._max_grad_norm = max_grad_norm
        self._loss_scaler = loss_scaler
        self._comm_dtypes = comm_dtypes
        self._timer = timer or StageTimer.off()
        self._iteration = 0
        self._warned = False
        given = self._parameters()
        self._device = given[0].device
        self._dtype = torch.float64 if given[0].dtype == torch.float64 else torch.float32
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._rescaled = {id(weight) for weight in rescaled_weights(model)}
        self._create_blocks = partial(create_blocks, model, form=batchnorm, skip=tuple(skip))
        self._owned = OwnedFisher(ema_decay, self._device)
        self._capture = Capture()
        self._capture.num_samples = num_samples
        self.blocks: list[Block] = []
        self.owners: list[tuple[int, ...]] = []
        self._index_groups()
        self._share_blocks()
        check_parameters(given, self.blocks)
        broadcast_model(model, self.communicator)

    def _share_blocks(self) -> None:
        """Give each layer its block and owners, as every rank does alike, and lay out the buffers.

        Called again when parameters were frozen or unfrozen: blocks that stay keep owners and Fisher.
        """
        rank, size = self.communicator.rank, self.communicator.size
        before = {block.name: (block, ranks) for block, ranks in zip(self.blocks, self.owners, strict=True)}
        made = self._create_blocks(trained=self._parameters())
        kept = {n: before[b.name] for n, b in enumerate(made) if b.name in before and b.is_like(before[b.name][0])}
        self.blocks = [kept[number][0] if number in kept else block for number, block in enumerate(made)]
        self.owners = assign_owners(
            [block_cost(block) for block in self.blocks], size, {number: ranks for number, (_, ranks) in kept.items()}
        )
        self._trainable = [parameter.requires_grad for parameter in self._parameters()]
        self._ranks_of = {block.name: ranks for block, ranks in zip(self.blocks, self.owners, strict=True)}
        self._owned.follow([block for block in self.blocks if rank in self._ranks_of[block.name]])
        self._buffers = StageBuffers(self.blocks, self.owners, size, self._dtype, self._device)
        self._updates = self._buffers.updates()
        self._refresh.plan_for(refresh_costs(self.blocks))
        self._capture.follow(self.blocks)
        trained = {id(parameter) for block in self.blocks for parameter in block.parameters}
        for parameter in [parameter for parameter in self.state if id(parameter) not in trained]:
            del self.state[parameter]  # what is frozen does not move: its velocity is gone
        self._begin_iteration()

    def _follow_freezing(self) -> None:
        """Share the blocks anew if parameters were frozen or unfrozen since."""
        if self._trainable != [parameter.requires_grad for parameter in self._parameters()]:
            self._share_blocks()

    # One step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Stages 3 to 6: average, invert, precondition, gather, update; collective.

        Args:
            closure: Computes the loss and its gradients again, under `enable_grad`; optional.

        Returns:
            The closure's result, or None.
        """
        self.refuse_grad_scaler()
        for group in self.param_groups:  # a scheduler may have set anything; every rank refuses alike
            check_kfac_group(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # In a user's autocast block products with inverses would overflow half precision.
        with torch.autocast(self._device.type, enabled=False):
            self.report = self._step()
        return loss

    def _step(self) -> StepReport:
        self._follow_freezing()
        present = self._agree_on_captured()
        if self._due_keys and not present and not self._agree_on_any_gradient():
            self._create_state()
            return StepReport()
        self._warn_of_absent(present)
        loss_scale = self._loss_scaler.scale if self._loss_scaler is not None else 1.0
        with self._timer.stage("reduce_scatter"):
            self._collect(loss_scale)
            if self._overflowed():
                self._begin_capture()
                return StepReport(skipped=True)
            gradients = self._start_reducing()
        with self._timer.stage("inverse"):
            inversion, changes = self._refresh_inverses(present)
        with self._timer.stage("reduce_scatter"):
            self._finish_gradients(gradients, loss_scale)
        with self._timer.stage("precondition"):
            self._precondition()
        with self._timer.stage("all_gather"):
            updates, comm_dtype = self._updates, self._comm_dtypes.gradients
            self.communicator.all_gather_v(updates.data, updates.counts, comm_dtype, updates.part_numels)
            all_changes = self._gather_changes(present, changes)
        with self._timer.stage("update"):
            self._update_parameters()
        # Factors that are due but that no rank captured stay due.
        refreshed = [key for key in self._due_keys if key[0] in present]
        self._refresh.record(self._iteration, dict.fromkeys(refreshed, float("inf")) | all_changes)
        self._iteration += 1
        self._begin_iteration()
        return StepReport(False, inversion.num_retries, inversion.num_kept, all_changes)

    def _agree_on_captured(self) -> dict[str, int]:
        """How many ranks captured factors of each block; blocks that none did are left out."""
        due = [block.name for block in self.blocks if any(name == block.name for name, _ in self._due_keys)]
        if not due:
            return {}
        counts = torch.tensor([float(name in self._capture.captured) for name in due], dtype=torch.float64)
        self.communicator.all_reduce_(counts)
        return {name: int(count) for name, count in zip(due, counts.tolist(), strict=True) if count}

    def _agree_on_any_gradient(self) -> bool:
        """Whether a gradient on any rank is not zero."""
        gradients = [parameter.grad for block in self.blocks for parameter in block.parameters]
        found = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        return bool(self.communicator.all_reduce_(torch.tensor(float(found)), "max"))

    def _create_state(self) -> None:
        """What a step on no data does: frameworks take one, to have a state to load into. No weight may change."""
        for block in self.blocks:
            for parameter in block.parameters:
                self._velocity(parameter)

    def _warn_of_absent(self, present: Mapping[str, int]) -> None:
        """Say once, on rank 0, which layers gave nothing although their factors are due."""
        absent = list(dict.fromkeys(name for name, _ in self._due_keys if name not in present))
        if absent and not self._warned:
            self._warned = True
            if self.communicator.is_main:
                logger.warning(
                    "K-FAC got no factors from %s: in eval mode, unused in this step, or its weights used without "
                    "calling it? Until it gives some it takes the plain gradient; skip=[…] leaves it to that for good",
                    ", ".join(absent),
                )

    def _collect(self, loss_scale: float) -> None:
        """Complete this rank's buffers of stage 3."""
        for parameter in (parameter for block in self.blocks for parameter in block.parameters):
            if parameter.grad is not None:
                refuse_sparse(self._names[id(parameter)], parameter.grad)
        passes, promised = self._capture.num_passes, self.accumulation_steps
        if promised is not None and passes not in (0, promised):
            raise ValueError(
                f"accumulation_steps is {promised}, but {passes} backward passes came since the last step: each loss "
                "is to be divided by the number that there are; leave accumulation_steps out to have them counted"
            )
        self._buffers.fill_gradients()
        self._capture.finish(loss_scale)
        for key in self._due_keys:
            first, *others = self._factors.copies(key)
            if key[0] not in self._capture.captured:
                first.zero_()  # what it held before is not this rank's share
            for other in others:
                other.copy_(first)

    def _overflowed(self) -> bool:
        """Whether anything overflowed on any rank; nothing that lasts has been changed yet."""
        buffers = [self._factors.data, self._buffers.gradients.data]
        return self._loss_scaler is not None and self._loss_scaler.overflowed(buffers, self.communicator)

    def _start_reducing(self) -> Pending[Tensor]:
        """Stage 3: each rank is left with the averages of what it owns.

        Returns when the factors are there; the gradients still travel, and are needed only in stage 5.
        """
        communicator, factors, gradients = self.communicator, self._factors, self._buffers.gradients
        *earlier, last = [
            communicator.start_reduce_scatter_v(buffer.data, buffer.counts, comm_dtype, buffer.part_numels)
            for buffer, comm_dtype in ((factors, self._comm_dtypes.factors), (gradients, self._comm_dtypes.gradients))
            if buffer.data.numel()
        ]
        for pending in earlier:
            pending.wait()
        return last

    def _finish_gradients(self, pending: Pending[Tensor], loss_scale: float) -> None:
        """Stage 3, the rest: wait for the gradients, undo the loss scale, clip."""
        gradients = pending.wait()
        if loss_scale != 1:
            gradients.mul_(1.0 / loss_scale)
        if self._max_grad_norm is not None:
            rank = self.communicator.rank
            own = [
                self._buffers.gradients.part(b.name, rank) for b in self._owned.blocks if self._is_first_owner(b.name)
            ]
            squared = sum((part.double().square().sum() for part in own), gradients.new_zeros((), dtype=torch.float64))
            clip_([gradients], squared, self._max_grad_norm, self.communicator)

    def _refresh_inverses(self, present: Mapping[str, int]) -> tuple[RefreshReport, dict[FactorKey, Tensor]]:
        """Stage 4: take the new factors into the running Fisher and factorise it.

        Returns:
            What went wrong, and Diff of the matrices of which this rank is the first owner, if it is tracked.
        """
        rank, size = self.communicator.rank, self.communicator.size
        factors: dict[FactorKey, Tensor] = {}
        changes: dict[FactorKey, Tensor] = {}
        for key in self._due_keys:
            name, matrix = key
            if name not in self._owned or name not in present:
                continue
            shape = self._owned[name].block.factor_shapes[matrix]
            factors[key] = factor = unpack_symmetric(self._factors.part(key, rank), *shape)
            if present[name] < size:  # the average was taken over all ranks, some of which had nothing to give
                factor *= size / present[name]
            if self._track_changes and self._is_first_owner(name):
                changes[key] = self._owned.change(key, factor)
        report = self._owned.refresh(
            factors, self._damping, lambda key: self._refresh.expected_interval(key, self._iteration)
        )
        return report, changes

    def _gather_changes(self, present: Mapping[str, int], own: Mapping[FactorKey, Tensor]) -> dict[FactorKey, float]:
        """Diff of all that was refreshed, the same on every rank; empty if it is not tracked."""
        keys = [key for key in self._due_keys if key[0] in present] if self._track_changes else []
        if not keys:
            return {}
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        values = self.communicator.all_reduce_(torch.stack([own.get(key, zero) for key in keys]))
        return dict(zip(keys, values.tolist(), strict=True))  # one copy from the device

    def _precondition(self) -> None:
        """Stage 5: 𝒢 of the owned blocks, into this rank's segment of the buffer that is gathered."""
        rank = self.communicator.rank
        blocks = self._owned.blocks
        gradients = [self._buffers.gradients.part(block.name, rank) for block in blocks]
        for block, gradient in zip(blocks, gradients, strict=True):
            add_weight_decay(block, [self._group_of(p)["weight_decay"] for p in block.parameters], gradient)
        shares = [
            share
            for block, direction in zip(blocks, self._owned.precondition(gradients), strict=True)
            for share in update_shares(self._updates, block, self._ranks_of[block.name], rank, direction)
        ]
        copy_all_([destination for destination, _ in shares], [values for _, values in shares])

    def _update_parameters(self) -> None:
        """Stage 6: every rank applies Eq. 17 and 18 to all parameters."""
        directions = {
            id(parameter): direction
            for block in self.blocks
            for parameter, direction in zip(block.parameters, read_update(self._updates, block), strict=True)
        }
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if id(parameter) in directions]
            velocities = [self._velocity(weight) for weight in weights]
            momentum_update_(weights, [directions[id(w)] for w in weights], velocities, group["lr"], group["momentum"])
            rescaled = [number for number, weight in enumerate(weights) if id(weight) in self._rescaled]
            rescale_weights_(
                [weights[number] for number in rescaled],
                group["weight_rescaling"],
                [velocities[number] for number in rescaled],
            )

    def _is_first_owner(self, name: str) -> bool:
        return self._ranks_of[name][0] == self.communicator.rank

    def _velocity(self, parameter: Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum_buffer"]
        return velocity

    # Iterations ---------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them the Fisher factors captured since the last step."""
        super().zero_grad(set_to_none)
        self._follow_freezing()
        self._begin_capture()

    def _begin_iteration(self) -> None:
        """Decide from the iteration alone, as every rank does alike, which factors the next step refreshes."""
        self._due_keys = self._refresh.due(all_factor_keys(self.blocks), self._iteration)
        self._factors = self._buffers.factors(self._due_keys)
        self._begin_capture()

    def _begin_capture(self) -> None:
        self._capture.begin({key: self._factors.copies(key)[0] for key in self._due_keys})

    def close(self) -> None:
        """Take the hooks off the model; the optimizer cannot be used any more. Hooks also go with the optimizer."""
        self._capture.close()

    # Settings -----------------------------------------------------------------------------------------

    def _parameters(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _index_groups(self) -> None:
        self._group_by_id = {id(parameter): group for group in self.param_groups for parameter in group["params"]}

    def _group_of(self, parameter: Parameter) -> dict[str, Any]:
        return self._group_by_id[id(parameter)]

    def _damping(self, block: Block) -> float:
        group = self._group_of(block.parameters[0])
        ratio = group["batchnorm_damping_ratio"] if block.uses_batchnorm_damping else 1.0
        return float(group["damping"] * ratio)

    @property
    def num_samples(self) -> int | None:
        """N of each backward pass on this rank; may be set before each forward."""
        return self._capture.num_samples

    @num_samples.setter
    def num_samples(self, value: int | None) -> None:
        check("num_samples", value is None or is_count(value), value, "an integer ≥ 1, or None")
        self._capture.num_samples = value

    @property
    def uncovered(self) -> list[Block]:
        """Blocks that get the plain gradient, with the reason."""
        return [block for block in self.blocks if not block.is_preconditioned]

    def describe(self) -> list[str]:
        """What is covered and what is not, a line each, for the log."""
        covered = len(self.blocks) - len(self.uncovered)
        reasons = [
            f"plain gradient for {block.name} ({block.num_values} values): {block.reason}" for block in self.uncovered
        ]
        return [f"K-FAC covers {covered} layers", *reasons]

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Smallest and largest eigenvalue and effective rank of each running matrix; collective, and not fast."""
        keys = all_factor_keys(self.blocks)
        values = torch.zeros(len(keys), 3, dtype=torch.float64)
        for number, (name, matrix) in enumerate(keys):
            spectrum = self._owned.spectrum((name, matrix)) if self._is_first_owner(name) else None
            if spectrum is not None:
                values[number] = spectrum
        self.communicator.all_reduce_(values)
        return {key: (low, high, rank) for key, (low, high, rank) in zip(keys, values.tolist(), strict=True)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only the constructor does, since layers are shared out over the ranks then.

        Raises:
            ValueError: If called later, or if a setting of the group is out of range.
        """
        if hasattr(self, "blocks"):
            raise ValueError("KFAC cannot take parameter groups after construction; give them all to the constructor")
        super().add_param_group(param_group)
        check_kfac_group(self.param_groups[-1])

    # State --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and under "kfac" the iteration and what *this rank* owns of the Fisher."""
        state = super().state_dict()
        state[_STATE_KEY] = {
            "iteration": self._iteration,
            "refresh": self._refresh.state_dict(),
            **self._owned.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the Fisher keeps its precision and returns to the parameters' device.

        Raises:
            ValueError: If the state lacks the Fisher of a block that this rank owns.
        """
        state = dict(state_dict)
        curvature_state = state.pop(_STATE_KEY, None)
        if curvature_state is None:
            raise ValueError('the state has no "kfac" entry: it was not saved by a KFAC optimizer')
        missing = self._owned.missing_from(curvature_state)
        if missing:
            raise ValueError(
                f"the state lacks the Fisher of {len(missing)} blocks that rank {self.communicator.rank} owns "
                f"({next(iter(missing))}, …): it was saved by another rank, number of ranks or model"
            )
        super().load_state_dict(state)
        self._index_groups()
        self._owned.load_state_dict(curvature_state, self._device, self._dtype)
        self._iteration = int(curvature_state["iteration"])
        self._refresh.load_state_dict(curvature_state["refresh"])
        self._begin_iteration()


def _refresh_schedule(refresh: RefreshSchedule | int) -> RefreshSchedule:
    if isinstance(refresh, RefreshSchedule):
        return refresh
    check("refresh", is_count(refresh), refresh, "an integer ≥ 1 or a RefreshSchedule")
    return IntervalRefresh(lambda iteration: refresh)

"""Distributed K-FAC as a `torch.optim.Optimizer`: stages 3 to 6 of Algorithm 1 (CVPR 2019)."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.owned import OwnedFisher
from kfac_dist.curvature.refresh_schedule import IntervalRefresh, RefreshSchedule
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.buffers import add_weight_decay
from kfac_dist.optim.distributed_fisher import DistributedFisher
from kfac_dist.optim.guards import check_arguments, placements, refuse_converted, refuse_replaced
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.settings import refuse_as_attributes
from kfac_dist.optim.shared_blocks import SharedBlocks
from kfac_dist.optim.step_report import StepReport
from kfac_dist.optim.update import momentum_update_, rescale_weights_, rescaled_weights
from kfac_dist.optim.validation import (
    check,
    check_choice,
    check_kfac_group,
    check_loss_scaler,
    check_max_norm,
    check_order,
    check_parameters,
    check_sample_fraction,
    is_count,
    is_number,
)
from kfac_dist.tensors.full_precision import full_fp32_products
from kfac_dist.timing import StageTimer
from kfac_dist.vocabulary import BatchNormForm, WeightRescaling, counted

STATE_KEY = "kfac"

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


@refuse_as_attributes
class KFAC(DistributedOptimizer):
    """K-FAC whose layers are shared out over the ranks; one rank takes the same path as many.

    Each rank calls `backward` on its own part of the batch; `step` averages gradients and Fisher factors over the
    ranks, so the model needs no DistributedDataParallel. At construction every rank takes rank 0's weights.

    Beside DistributedDataParallel, give this `ddp.module` and call that, or call `ddp` within `ddp.no_sync()`. Else
    both average the gradients: the result is the same, at the price of a second all-reduce.

    `lr`, `momentum`, `damping`, `batchnorm_damping_ratio`, `weight_decay` and `weight_rescaling` are settings of
    parameter groups and are read at every step, so that learning-rate schedulers work; a layer takes its damping
    from the group of its first parameter, whenever its matrices are refreshed.

    As in torch, a parameter that has no gradient (None, on any rank) stays as it is, and so does all else if none has
    one. A layer that is frozen keeps its momentum and its Fisher for when it returns with the same parameters trained.
    What was captured of a batch goes with its gradients, be they dropped by this `zero_grad` or, set to None, by the
    model's; gradients that the model's `zero_grad(set_to_none=False)` fills with zeros leave their factors behind.

    Attributes:
        report: What came of the last step.
        accumulation_steps: As given to the constructor; may be set between steps.
    """

    accumulation_steps: int | None

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
        sample_fraction: float = 1.0,
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
            sample_fraction: Share of the samples of each backward pass on this rank, in (0, 1] and rounded up, that A
                and G are computed from (Martens & Grosse 2015, section 8): the first ones, so their order must be
                random. All serve BatchNorm's F. Refused beside `num_samples`, with which it would do nothing.
            max_grad_norm: Norm that the *averaged*, unscaled gradient is clipped to before preconditioning; None does
                not clip.
            skip: Shell-style patterns of module names that get the plain gradient.
            track_changes: Put Diff (Eq. 19) of each refreshed matrix into `report`; an adaptive schedule always does.
            loss_scaler: For fp16, what each loss is scaled with before its backward; `step` unscales by itself, and
                skips the update, on every rank, if anything overflowed on any. None if losses are not scaled.
            comm_dtypes: What factors and gradients travel in between ranks.
            timer: Charged with the stages' seconds.

        Raises:
            TypeError: If something else than a model or a communicator is given for one, or the model is sharded or
                complex.
            ValueError: If a setting is out of range, nothing is to be trained, the ranks' models differ, or the loss
                scaler serves another optimizer.
        """
        self.communicator = check_arguments("KFAC", model, communicator)
        check_choice("batchnorm", batchnorm, get_args(BatchNormForm))
        is_decay = ema_decay is None or (is_number(ema_decay) and 0 < ema_decay < 1)
        check("ema_decay", is_decay, repr(ema_decay), "a number in (0, 1), or None")
        check("skip", not isinstance(skip, str), repr(skip), "a list of patterns")
        check_sample_fraction(sample_fraction, num_samples)
        check_max_norm(max_grad_norm)
        check_loss_scaler(loss_scaler)
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
        self._max_grad_norm = max_grad_norm
        self._loss_scaler = loss_scaler
        self._comm_dtypes = comm_dtypes
        self._timer = timer or StageTimer.off()
        given = self._parameters()
        self._device = given[0].device
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in given) else torch.float32
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._placements = placements(given, self._names)
        self._rescaled = {id(weight) for weight in rescaled_weights(model)}
        self._create_blocks = partial(create_blocks, model, form=batchnorm, skip=tuple(skip))
        self._shared = SharedBlocks(self.communicator, self._dtype, self._device)
        self._fisher = DistributedFisher(
            self.communicator,
            self._shared,
            OwnedFisher(ema_decay, self._device),
            _refresh_schedule(refresh),
            track_changes,
        )
        self._fisher.capture.num_samples = num_samples
        self._fisher.capture.sample_fraction = float(sample_fraction)
        self._index_groups()
        self._share_blocks()
        check_parameters(given, self.blocks)
        if loss_scaler is not None:
            loss_scaler.serve(self)
        self._start_alike(
            model,
            given,
            batchnorm=batchnorm,
            ema_decay=ema_decay,
            refresh=type(refresh).__name__ if isinstance(refresh, RefreshSchedule) else refresh,
            sample_fraction=sample_fraction,
            max_grad_norm=max_grad_norm,
            skip=sorted(skip),  # a set's order differs on every rank
            track_changes=track_changes,
            loss_scaler=loss_scaler is not None,
            comm_dtypes=comm_dtypes,
        )

    def _share_blocks(self) -> None:
        """Share out the blocks, as every rank does alike; again when parameters were frozen or unfrozen.

        What is frozen keeps its velocity, as in torch.
        """
        self._trainable = [parameter.requires_grad for parameter in self._parameters()]
        self._shared.share(self._create_blocks(trained=self._parameters()))
        self._fisher.follow()
        self._hook_gradients(self._shared.buffers.messages, self._comm_dtypes.gradients, self._names)

    def _follow_freezing(self) -> None:
        """Share the blocks anew if parameters were frozen or unfrozen since; a closed optimizer hooks nothing more."""
        if not self._is_closed and self._trainable != [parameter.requires_grad for parameter in self._parameters()]:
            self._share_blocks()

    # One step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Stages 3 to 6: average, invert, precondition, gather, update; collective.

        Args:
            closure: Computes the loss and its gradients again, under `enable_grad`; optional.

        Returns:
            The closure's result, or None.

        Raises:
            TypeError: If a `torch.amp.GradScaler` drives it.
            ValueError: If a setting is out of range, a gradient is sparse, the model was converted, a layer's
                parameters were replaced, other parameters are frozen on other ranks, or other settings or states are
                there.
            RuntimeError: After `close`.
        """
        self.refuse_closed()
        self.refuse_grad_scaler()
        for group in self.param_groups:  # a scheduler may have set anything; every rank refuses alike
            check_kfac_group(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # In a user's autocast block products with inverses would overflow half precision.
        with torch.autocast(self._device.type, enabled=False), full_fp32_products():
            self.report = self._step()
        return loss

    def skip_step(self) -> None:
        super().skip_step()
        self._fisher.begin_capture()

    def _step(self) -> StepReport:
        refuse_converted(self._parameters(), self._placements, self._names)
        self._messages.begin_step()
        self._follow_freezing()
        for block in self.blocks:
            if not block.is_in_place:
                refuse_replaced(block.name)
        fisher, updates = self._fisher, self._shared.updates
        agreed, present = fisher.agree(self._parameters(), self._names, self._messages.was_overlapped, self._settings())
        self._agree_on_first_weights(self._parameters(), self._names)
        moved = agreed.with_gradient
        if not agreed.all_sent:  # a rank dropped its gradients since
            self._messages.discard()
        if not moved or (fisher.is_due and not present and not self._agree_on_any_gradient()):
            self._messages.discard()
            self._create_state()
            return StepReport()
        fisher.warn_of_absent(present)
        loss_scale = self._loss_scale
        with self._timer.stage("reduce_scatter"):
            self._collect(loss_scale)
            if self._overflowed(fisher.factors.data):
                self.skip_step()
                return self.report
            reduction = fisher.start_reduction(self._comm_dtypes.factors)
            self._messages.start()  # the gradients travel on while the factors are inverted
            reduction.wait()
        with self._timer.stage("inverse"):
            inversion, own_changes = fisher.refresh(present, self._damping)
        with self._timer.stage("reduce_scatter"):
            self._receive_averages(loss_scale, lambda: self._shared.first_owned_gradients)
        with self._timer.stage("precondition"):
            self._precondition()
        with self._timer.stage("all_gather"):
            comm_dtype = self._comm_dtypes.gradients
            self.communicator.all_gather_v(updates.data, updates.counts, comm_dtype, updates.part_numels)
            changes = fisher.gather_changes(present, own_changes)
        with self._timer.stage("update"):
            self._update_parameters(moved)
        fisher.end_iteration(present, changes)
        return StepReport(False, inversion.num_retries, inversion.num_kept, changes)

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

    def _collect(self, loss_scale: float) -> None:
        """Complete this rank's buffers of stage 3."""
        passes, promised = self._fisher.capture.num_passes, self.accumulation_steps
        if promised is not None and passes not in (0, promised):
            raise ValueError(
                f"accumulation_steps is {promised}, but {passes} backward passes came since the last step: each loss "
                "is to be divided by the number that there are; leave accumulation_steps out to have them counted"
            )
        self._messages.fill()
        self._fisher.finish_capture(loss_scale)

    def _precondition(self) -> None:
        """Stage 5: 𝒢 of the owned blocks, into this rank's segment of the buffer that is gathered."""
        gradients = self._shared.owned_gradients
        for block, gradient in zip(self._shared.owned, gradients, strict=True):
            add_weight_decay(block, [self._group_of(p)["weight_decay"] for p in block.parameters], gradient)
        for group in self._fisher.owned.precondition(gradients):
            self._shared.write_updates(group)

    def _update_parameters(self, moved: Collection[int]) -> None:
        """Stage 6: every rank applies Eq. 17 and 18 to the parameters (by id) that have a gradient on some rank."""
        directions = self._shared.read_updates()
        for group in self.param_groups:
            weights = [p for p in group["params"] if id(p) in moved and id(p) in directions]
            velocities = [self._velocity(weight) for weight in weights]
            momentum_update_(weights, [directions[id(w)] for w in weights], velocities, group["lr"], group["momentum"])
            rescaled = [number for number, weight in enumerate(weights) if id(weight) in self._rescaled]
            rescale_weights_(
                [weights[number] for number in rescaled],
                group["weight_rescaling"],
                [velocities[number] for number in rescaled],
            )

    def _velocity(self, parameter: Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum_buffer"]
        return velocity

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them the Fisher factors captured since the last step."""
        super().zero_grad(set_to_none)
        self._follow_freezing()
        # Many a loop calls zero_grad between forward and backward, so what the forward kept must not go.
        self._fisher.capture.forget()

    def close(self) -> None:
        """Take the hooks off the model; the optimizer cannot be used any more. Hooks also go with the optimizer."""
        super().close()
        self._fisher.capture.close()

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
        return self._fisher.capture.num_samples

    @num_samples.setter
    def num_samples(self, value: int | None) -> None:
        check("num_samples", value is None or is_count(value), value, "an integer ≥ 1, or None")
        check_sample_fraction(self._fisher.capture.sample_fraction, value)
        self._fisher.capture.num_samples = value

    @property
    def blocks(self) -> list[Block]:
        """A block for each layer with parameters, in the model's order."""
        return self._shared.blocks

    @property
    def owners(self) -> list[tuple[int, ...]]:
        """For each block the ranks that own it."""
        return self._shared.owners

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
        warnings = self._fisher.warnings_of_size() if self._comm_dtypes.factors is not None else []
        fraction = self._fisher.capture.sample_fraction
        part = f", A and G from the first {100 * fraction:.4g} % of each pass's samples" if fraction < 1 else ""
        return [f"K-FAC covers {counted(covered, 'layer')}{part}", *reasons, *warnings]

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Smallest and largest eigenvalue and effective rank of each running matrix; collective, and not fast."""
        return self._fisher.spectra()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only the constructor does, since layers are shared out over the ranks then.

        Raises:
            ValueError: If called later, or if a setting of the group is out of range.
        """
        if hasattr(self, "_shared"):
            raise ValueError("KFAC cannot take parameter groups after construction; give them all to the constructor")
        super().add_param_group(param_group)
        check_kfac_group(self.param_groups[-1])

    # State --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and under "kfac" the iteration and what *this rank* owns of the Fisher."""
        self._follow_freezing()  # or it could not be loaded into a model that is frozen as this one is now
        state = super().state_dict()
        state[STATE_KEY] = self._fisher.state_dict()
        return state

    def full_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the Fisher of all blocks, which any rank of any number of ranks can load; collective."""
        self._follow_freezing()
        state = super().state_dict()
        state[STATE_KEY] = self._fisher.full_state_dict()
        return state

    def owned_blocks(self, first_only: bool) -> list[str]:
        return [b.name for b in self._shared.owned if not first_only or self._shared.is_first_owner(b.name)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the Fisher keeps its precision and returns to the parameters' device.

        Raises:
            ValueError: If the state is of another model, or of one frozen otherwise, or lacks the Fisher of a block
                that this rank owns; then nothing has been changed.
            RuntimeError: After `close`.
        """
        self.refuse_closed()
        self._follow_freezing()
        state = dict(state_dict)
        curvature_state = state.pop(STATE_KEY, None)
        if curvature_state is None:
            raise ValueError('the state has no "kfac" entry: it was not saved by a KFAC optimizer')
        self._fisher.check_state(curvature_state)
        check_order(self.param_groups, state["param_groups"])
        super().load_state_dict(state)
        self._index_groups()
        self._fisher.load_state_dict(curvature_state, self._device, self._dtype)
        # The buffers are laid out by the state's owners.
        self._hook_gradients(self._shared.buffers.messages, self._comm_dtypes.gradients, self._names)


def _refresh_schedule(refresh: RefreshSchedule | int) -> RefreshSchedule:
    if isinstance(refresh, RefreshSchedule):
        return refresh
    check("refresh", is_count(refresh), refresh, "an integer ≥ 1 or a RefreshSchedule")
    return IntervalRefresh(lambda iteration: refresh)

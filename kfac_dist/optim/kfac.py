"""Distributed K-FAC as a `torch.optim.Optimizer`: stages 3 to 6 of Algorithm 1 (CVPR 2019)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator, Pending, create_communicator
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.batchnorm import BatchNormForm
from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.create import block_cost, create_blocks, refresh_costs
from kfac_dist.curvature.capture import Capture
from kfac_dist.curvature.inversion import InverseRefresh, InversionTask
from kfac_dist.curvature.precondition import Preconditioner
from kfac_dist.curvature.refresh_schedule import IntervalRefresh, RefreshSchedule
from kfac_dist.curvature.running import BlockCurvature, RunningAverage, update_running_averages
from kfac_dist.curvature.spectrum import spectrum
from kfac_dist.optim.buffers import StageBuffers, add_weight_decay, all_factor_keys, read_update, update_shares
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.update import WeightRescaling, momentum_update_, rescale_weights_, rescaled_weights
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.tensors.packing import unpack_symmetric
from kfac_dist.timing import StageTimer

_STATE_KEY = "kfac"


class KFAC(torch.optim.Optimizer):
    """K-FAC whose layers are shared out over the ranks; one rank takes the same path as many.

    Each rank calls `backward` on its own part of the batch; `step` averages gradients and Fisher factors over the
    ranks, so the model needs no DistributedDataParallel. At construction every rank takes rank 0's weights.

    `lr`, `momentum`, `damping`, `batchnorm_damping_ratio`, `weight_decay` and `weight_rescaling` are settings of
    parameter groups and are read at every step, so that learning-rate schedulers work; a layer takes its damping
    from the group of its first parameter.

    Attributes:
        blocks: A block for each layer with parameters, in the model's order.
        owners: For each block the ranks that own it.
        num_retries: Factorisations on this rank that needed more damping, so far.
        num_kept_inverses: Refreshes on this rank that failed for good and kept the previous inverse, so far.
        changes: Diff of each matrix that the last step refreshed, the same on every rank; empty if not tracked.
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
        accumulation_steps: int = 1,
        skip: Sequence[str] = (),
        track_changes: bool = False,
        loss_scaler: LossScaler | None = None,
        factor_comm_dtype: torch.dtype | None = None,
        gradient_comm_dtype: torch.dtype | None = None,
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
            accumulation_steps: Backward passes for each `step`; divide each loss by this number, as usual.
            skip: Shell-style patterns of module names that shall get the plain gradient.
            track_changes: Keep Diff (Eq. 19) of each refreshed matrix in `changes`; an adaptive schedule always does.
            loss_scaler: For fp16, what each loss is scaled with before its backward; `step` unscales by itself, and
                skips the update, on every rank, if anything overflowed on any. None if losses are not scaled.
            factor_comm_dtype: Half precision that factors travel in between ranks; None sends them as they are.
            gradient_comm_dtype: Likewise for gradients and preconditioned gradients.
            timer: Charged with the stages' seconds.

        Raises:
            ValueError: If a setting is out of range, or nothing is to be trained.
        """
        if params is None:
            params = model.named_parameters()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "batchnorm_damping_ratio": batchnorm_damping_ratio,
            "weight_decay": weight_decay,
            "weight_rescaling": weight_rescaling,
        }
        super().__init__(params, defaults)
        _check_choice("batchnorm", batchnorm, ("full", "unit", "diagonal"))
        _check("ema_decay", ema_decay is None or 0 < ema_decay < 1, ema_decay, "in (0, 1) or None")
        if not isinstance(refresh, RefreshSchedule):
            _check("refresh", _is_count(refresh), refresh, "an integer ≥ 1 or a RefreshSchedule")
            interval = refresh
            refresh = IntervalRefresh(lambda iteration: interval)
        _check("accumulation_steps", _is_count(accumulation_steps), accumulation_steps, "an integer ≥ 1")
        _check("skip", not isinstance(skip, str), repr(skip), "a list of patterns")
        self.communicator = communicator if communicator is not None else create_communicator()
        self.accumulation_steps = accumulation_steps
        self.num_retries = 0
        self.num_kept_inverses = 0
        self._ema_decay = ema_decay
        self._refresh = refresh
        self._track_changes = track_changes or refresh.needs_changes
        self._loss_scaler = loss_scaler
        self._loss_scale = 1.0  # of the losses behind the gradients of this step
        self._factor_comm_dtype = factor_comm_dtype
        self._gradient_comm_dtype = gradient_comm_dtype
        self.changes: dict[FactorKey, float] = {}
        self._timer = timer or StageTimer.off()
        self._iteration = 0

        trained = [parameter for group in self.param_groups for parameter in group["params"]]
        self._dtype = torch.float64 if trained[0].dtype == torch.float64 else torch.float32
        self.blocks = create_blocks(model, trained, batchnorm, skip)
        _check("params", bool(self.blocks), f"{len(trained)} parameters", "trainable parameters of the model")
        covered = {id(parameter) for block in self.blocks for parameter in block.parameters}
        foreign = [tuple(p.shape) for p in trained if p.requires_grad and id(p) not in covered]
        _check("params", not foreign, f"others too, of shapes {foreign}", "parameters of the model")
        self._rescaled = {id(weight) for weight in rescaled_weights(model)}
        self.owners = assign_owners([block_cost(block) for block in self.blocks], self.communicator.size)
        self._first_owner = {block.name: ranks[0] for block, ranks in zip(self.blocks, self.owners, strict=True)}
        self._owned = {
            block.name: BlockCurvature(block)
            for block, ranks in zip(self.blocks, self.owners, strict=True)
            if self.communicator.rank in ranks
        }
        self._device = trained[0].device
        self._preconditioner = Preconditioner()
        self._inverse_refresh = InverseRefresh(deferred=self._device.type == "cuda")
        self._buffers = StageBuffers(self.blocks, self.owners, self.communicator.size, self._dtype, self._device)
        self._index_groups()
        self._refresh.plan_for(refresh_costs(self.blocks))
        self._capture = Capture(self.blocks)
        self._begin_iteration()
        for tensor in (*model.parameters(), *model.buffers()):
            self.communicator.broadcast_(tensor.data)

    # One step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Stages 3 to 6: average, invert, precondition, gather, update; collective.

        Args:
            closure: Computes the loss and its gradients again, under `enable_grad`; optional.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = self._agree_on_captured()
        if self._due_keys and not present and not self._agree_on_any_gradient():
            self._create_state()
            return loss
        with self._timer.stage("reduce_scatter"):
            self._collect()
            if self._overflowed():
                self._begin_capture()
                return loss
            gradients = self._start_reducing()
        with self._timer.stage("inverse"):
            self._refresh_inverses(present)
        with self._timer.stage("reduce_scatter"):
            self._finish_gradients(gradients)
        with self._timer.stage("precondition"):
            self._precondition()
        with self._timer.stage("all_gather"):
            self.communicator.all_gather_v(self._updates.data, self._updates.counts, self._gradient_comm_dtype)
        with self._timer.stage("update"):
            self._update_parameters()
        if present or not self._due_keys:  # factors that are due but that no rank captured stay due
            self._record_refresh(present)
            self._iteration += 1
        self._begin_iteration()
        return loss

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

    def _collect(self) -> None:
        """Complete this rank's buffers of stage 3."""
        self._buffers.fill_gradients()
        for key in self._due_keys:
            first, *others = self._factors.copies(key)
            if key[0] not in self._capture.captured:
                first.zero_()  # what it held before is not this rank's share
            for other in others:
                other.copy_(first)

    def _overflowed(self) -> bool:
        """Whether anything overflowed on any rank; nothing that lasts has been changed yet."""
        if self._loss_scaler is None:
            return False
        self._loss_scale = self._loss_scaler.scale
        return self._loss_scaler.overflowed([self._factors.data, self._buffers.gradients.data], self.communicator)

    def _start_reducing(self) -> Pending[Tensor]:
        """Stage 3: each rank is left with the averages of what it owns.

        Returns when the factors are there; the gradients still travel, and are needed only in stage 5.
        """
        communicator, factors, gradients = self.communicator, self._factors, self._buffers.gradients
        *earlier, last = [
            communicator.start_reduce_scatter_v(buffer.data, buffer.counts, comm_dtype)
            for buffer, comm_dtype in ((factors, self._factor_comm_dtype), (gradients, self._gradient_comm_dtype))
            if buffer.data.numel()
        ]
        for pending in earlier:
            pending.wait()
        return last

    def _finish_gradients(self, pending: Pending[Tensor]) -> None:
        """Stage 3, the rest: wait for the gradients and undo the loss scale."""
        gradients = pending.wait()
        if self._loss_scaler is not None:
            gradients.mul_(1.0 / self._loss_scale)

    def _refresh_inverses(self, present: Mapping[str, int]) -> None:
        """Stage 4: take the new factors into the running Fisher and factorise it."""
        rank, size = self.communicator.rank, self.communicator.size
        refreshed: dict[str, list[str]] = {}
        factors: list[tuple[RunningAverage, Tensor]] = []
        for name, matrix in self._due_keys:
            if name not in self._owned or name not in present:
                continue
            curvature = self._owned[name]
            packed = self._factors.part((name, matrix), rank)
            factor = unpack_symmetric(packed, *curvature.block.factor_shapes[matrix])
            if present[name] < size:  # the average was taken over all ranks, some of which had nothing to give
                factor *= size / present[name]
            if self._track_changes and self._is_first_owner(name):
                change = curvature.averages[matrix].change(factor, self._ema_decay)
                self._updates.part((name, matrix), rank).copy_(change)
            factors.append((curvature.averages[matrix], factor))
            refreshed.setdefault(name, []).append(matrix)
        update_running_averages(factors, self._ema_decay)
        tasks = [
            InversionTask(self._owned[name], self._damping(self._owned[name].block), matrices)
            for name, matrices in refreshed.items()
        ]
        report = self._inverse_refresh.refresh(tasks, lambda key: self._refresh.expected_interval(key, self._iteration))
        self.num_retries += report.num_retries
        self.num_kept_inverses += report.num_kept

    def _precondition(self) -> None:
        """Stage 5: 𝒢 of the owned blocks, into this rank's segment of the buffer that is gathered."""
        rank = self.communicator.rank
        owned = [(block, ranks) for block, ranks in zip(self.blocks, self.owners, strict=True) if rank in ranks]
        gradients = [self._buffers.gradients.part(block.name, rank) for block, _ in owned]
        for (block, _), gradient in zip(owned, gradients, strict=True):
            add_weight_decay(block, [self._group_of(p)["weight_decay"] for p in block.parameters], gradient)
        directions = self._preconditioner.apply([self._owned[block.name] for block, _ in owned], gradients)
        shares = [
            share
            for (block, ranks), direction in zip(owned, directions, strict=True)
            for share in update_shares(self._updates, block, ranks, rank, direction)
        ]
        copy_all_([place for place, _ in shares], [values for _, values in shares])

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

    def _record_refresh(self, present: Mapping[str, int]) -> None:
        """Tell the schedule, the same on every rank, what was refreshed and by how much it changed."""
        changes = dict.fromkeys(self._due_keys, float("inf"))
        known = [key for key in changes if key[0] in present]
        if self._track_changes and known:
            values = torch.cat([self._updates.copies(key)[0] for key in known]).tolist()  # one copy from the device
            changes |= dict(zip(known, values, strict=True))
        self.changes = changes if self._track_changes else {}
        self._refresh.record(self._iteration, changes)

    def _is_first_owner(self, name: str) -> bool:
        return self._first_owner[name] == self.communicator.rank

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
        self._begin_capture()

    def _begin_iteration(self) -> None:
        """Decide from the iteration alone, as every rank does alike, which factors the next step refreshes."""
        self._due_keys = self._refresh.due(all_factor_keys(self.blocks), self._iteration)
        self._factors = self._buffers.factors(self._due_keys)
        self._updates = self._buffers.updates(self._due_keys if self._track_changes else ())
        self._begin_capture()

    def _begin_capture(self) -> None:
        destinations = {key: self._factors.copies(key)[0] for key in self._due_keys}
        loss_scale = self._loss_scaler.scale if self._loss_scaler is not None else 1.0
        self._capture.begin(destinations, self.accumulation_steps, loss_scale)

    # Settings -----------------------------------------------------------------------------------------

    def _index_groups(self) -> None:
        self._group_by_id = {id(parameter): group for group in self.param_groups for parameter in group["params"]}

    def _group_of(self, parameter: Parameter) -> dict[str, Any]:
        return self._group_by_id[id(parameter)]

    def _damping(self, block: Block) -> float:
        group = self._group_of(block.parameters[0])
        ratio = group["batchnorm_damping_ratio"] if block.uses_batchnorm_damping else 1.0
        return float(group["damping"] * ratio)

    @property
    def uncovered(self) -> list[Block]:
        """Blocks that get the plain gradient, with the reason."""
        return [block for block in self.blocks if not block.is_preconditioned]

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Smallest and largest eigenvalue and effective rank of each running matrix; collective, and not fast."""
        keys = all_factor_keys(self.blocks)
        values = torch.zeros(len(keys), 3, dtype=torch.float64)
        for number, (name, matrix) in enumerate(keys):
            if self._is_first_owner(name) and matrix in self._owned[name].running:
                values[number] = spectrum(self._owned[name].running[matrix]).cpu()
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
        group = self.param_groups[-1]
        for name, allowed, rule in (
            ("lr", group["lr"] >= 0, "≥ 0"),
            ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
            ("damping", group["damping"] > 0, "> 0"),
            ("batchnorm_damping_ratio", group["batchnorm_damping_ratio"] > 0, "> 0"),
            ("weight_decay", group["weight_decay"] >= 0, "≥ 0"),
        ):
            _check(name, allowed, group[name], rule)
        _check_choice("weight_rescaling", group["weight_rescaling"], ("always", "cap", "off"))

    # State --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and under "kfac" the iteration and what *this rank* owns of the Fisher."""
        state = super().state_dict()
        state[_STATE_KEY] = {
            "iteration": self._iteration,
            "refresh": self._refresh.state_dict(),
            "retries": self._inverse_refresh.state_dict(),
            "blocks": {name: curvature.state_dict() for name, curvature in self._owned.items()},
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
        missing = sorted(set(self._owned) - set(curvature_state["blocks"]))
        if missing:
            raise ValueError(
                f"the state lacks the Fisher of {len(missing)} blocks that rank {self.communicator.rank} owns "
                f"({missing[0]}, …): it was saved by another rank, number of ranks or model"
            )
        super().load_state_dict(state)
        self._index_groups()
        for name, curvature in self._owned.items():
            curvature.load_state_dict(curvature_state["blocks"][name], self._device, self._dtype)
        self._inverse_refresh.load_state_dict(curvature_state["retries"], self._owned)
        self._iteration = int(curvature_state["iteration"])
        self._refresh.load_state_dict(curvature_state["refresh"])
        self._begin_iteration()


def _check(name: str, allowed: bool, value: object, rule: str) -> None:
    if not allowed:
        raise ValueError(f"{name} must be {rule}, got {value}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    _check(name, value in choices, repr(value), "one of " + ", ".join(choices))

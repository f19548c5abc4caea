"""Optimizers that need nothing of the ranks but the averaged gradient: the update itself is one of `torch.optim`."""

import inspect
import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.curvature.blocks.base import holds
from kfac_dist.optim.agreement import agree_on_group, agree_on_step
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.gradient_messages import Message, cut_for_backward
from kfac_dist.optim.guards import check_arguments, placements, refuse_converted, refuse_replaced
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.step_report import StepReport
from kfac_dist.optim.update import rescale_weights_, rescaled_weights
from kfac_dist.optim.validation import check, check_choice, check_loss_scaler, check_max_norm
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.tensors.packing import FlatBuffer, Part
from kfac_dist.timing import StageTimer
from kfac_dist.vocabulary import WeightRescaling


@dataclass(frozen=True)
class Averaging:
    """How gradients get from all ranks to the update, and what follows it; as the keywords of `SGD`.

    Attributes:
        weight_rescaling: Eq. 18, as in `KFAC`.
        max_grad_norm: Norm that the averaged, unscaled gradient is clipped to; None does not clip.
        loss_scaler: For fp16, what each loss is scaled with before its backward.
        gradient_comm_dtype: Half precision in which gradients are sent; None sends them as they are.
        timer: Charged with the stages' seconds.
    """

    weight_rescaling: WeightRescaling = "off"
    max_grad_norm: float | None = None
    loss_scaler: LossScaler | None = None
    gradient_comm_dtype: torch.dtype | None = None
    timer: StageTimer | None = None


DEFAULT_AVERAGING = Averaging()


class AveragedOptimizer(DistributedOptimizer):
    """Averages the gradients over the ranks, lets a torch optimizer update, and rescales the weights.

    A subclass has a class of `torch.optim` as its second base, whose `step` is the update, or a `_move` of its own. Its
    constructor calls `_check`, then torch's constructor, then `_start`.

    At construction every rank takes rank 0's weights. As in torch, a parameter that has no gradient (None, on any
    rank) stays as it is, and a frozen one keeps its state.

    Attributes:
        report: What came of the last step.
    """

    def _check(
        self, model: nn.Module, communicator: Communicator | None, params: Iterable[Any] | None, averaging: Averaging
    ) -> Iterable[Any]:
        """Look at the arguments before torch's constructor does; returns what to train."""
        self.communicator = check_arguments(type(self).__name__, model, communicator)
        check_choice("weight_rescaling", averaging.weight_rescaling, get_args(WeightRescaling))
        check_max_norm(averaging.max_grad_norm)
        check_loss_scaler(averaging.loss_scaler)
        return model.parameters() if params is None else params

    def _start(self, model: nn.Module, averaging: Averaging, **arguments: object) -> None:
        """Lay out the buffers and take rank 0's weights; collective. Every rank must give the same `arguments`."""
        self.report = StepReport()
        self._timer = averaging.timer or StageTimer.off()
        self._weight_rescaling: WeightRescaling = averaging.weight_rescaling
        self._max_grad_norm = averaging.max_grad_norm
        self._loss_scaler = averaging.loss_scaler
        self._gradient_comm_dtype = averaging.gradient_comm_dtype
        self._model = weakref.ref(model)
        self._look_at_layers()
        self._trained: list[Parameter] = []
        self._follow_freezing()
        check("params", bool(self._trained), "none", "parameters that are not frozen")
        self._placements = placements(self._parameters(), self._names)
        if self._loss_scaler is not None:
            self._loss_scaler.serve(self)
        self._start_alike(
            model,
            self._parameters(),
            weight_rescaling=averaging.weight_rescaling,
            max_grad_norm=averaging.max_grad_norm,
            loss_scaler=averaging.loss_scaler is not None,
            gradient_comm_dtype=averaging.gradient_comm_dtype,
            **arguments,
        )

    def _look_at_layers(self) -> None:
        """Note which parameters are what in the model, which may have got more layers."""
        model = self._model()
        if model is not None:
            self._names = {id(parameter): name for name, parameter in model.named_parameters()}
            self._rescalable = list(rescaled_weights(model))
            self._places = [
                (weakref.ref(module), place, parameter)
                for module in model.modules()
                for place, parameter in module._parameters.items()
                if parameter is not None
            ]

    def _refuse_replaced(self) -> None:
        """Refuse to train parameters in whose place a layer has others now; a layer that is gone does no harm."""
        model, given = self._model(), {id(parameter) for parameter in self._parameters()}
        for layer, place, parameter in self._places:
            module = layer()
            if module is None or module._parameters.get(place) is parameter or id(parameter) not in given:
                continue
            if model is not None and not holds(model, parameter):
                refuse_replaced(self._names[id(parameter)])

    def _parameters(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _follow_freezing(self) -> None:
        """Lay out the buffer for the parameters that are trained now; users freeze, unfreeze and add."""
        given = self._parameters()
        trained = [parameter for parameter in given if parameter.requires_grad]
        for parameter in given:
            if not parameter.requires_grad:
                parameter.grad = None  # or torch would go on with what is left of it
        if len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained)):
            return
        self._trained = trained
        known = {id(parameter) for parameter in trained}
        self._rescaled = [weight for weight in self._rescalable if id(weight) in known]
        self._hook_gradients(self._cut(), self._gradient_comm_dtype, self._names)

    def _cut(self) -> list[Message]:
        """The trained parameters' messages; each rank owns an equal share of each."""
        double = any(parameter.dtype == torch.float64 for parameter in self._trained)
        # Never half precision: MPI cannot add it, and sums over ranks would round.
        dtype, device = torch.float64 if double else torch.float32, self._parameters()[0].device
        numels = [parameter.numel() for parameter in self._trained]
        messages = []
        size, in_background = self.communicator.size, self.communicator.in_background
        for numbers in cut_for_backward([n * dtype.itemsize for n in numels], size, in_background):
            total = sum(numels[number] for number in numbers)
            shares = [total * (rank + 1) // size - total * rank // size for rank in range(size)]
            parts = [Part(rank, rank, share) for rank, share in enumerate(shares)]
            buffer = FlatBuffer(parts, size, torch.zeros(total, dtype=dtype, device=device))
            pieces = buffer.data.split([numels[number] for number in numbers]) if numbers else ()
            views = [
                (p, piece.view(p.shape)) for p, piece in zip((self._trained[n] for n in numbers), pieces, strict=True)
            ]
            messages.append(Message(buffer, views))
        return messages

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; collective once the optimizer is made: they take rank 0's values."""
        super().add_param_group(param_group)
        if hasattr(self, "_trained"):
            self._look_at_layers()
            added = self.param_groups[-1]["params"]
            agree_on_group(self._names, added, self.communicator)
            for parameter in added:
                self.communicator.broadcast_(parameter.data)
            self._placements += placements(added, self._names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, update, rescale; collective.

        Args:
            closure: Computes the loss and its gradients again, under `enable_grad`; optional.

        Returns:
            The closure's result, or None.

        Raises:
            TypeError: If a `torch.amp.GradScaler` drives it.
            ValueError: If a gradient is sparse, the model was converted, its parameters were replaced, or settings or
                what is frozen differ on other ranks.
            RuntimeError: After `close`.
        """
        self.refuse_closed()
        self.refuse_grad_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_converted(self._parameters(), self._placements, self._names)
        self._refuse_replaced()
        self._follow_freezing()
        self._messages.begin_step()
        agreed = agree_on_step(
            self._parameters(),
            self._names,
            self.communicator,
            has_sent=self._messages.was_overlapped,
            settings=self._settings(),
        )
        self._agree_on_first_weights(self._parameters(), self._names)
        moved = agreed.with_gradient
        if not agreed.all_sent:  # a rank dropped its gradients since
            self._messages.discard()
        self.report = StepReport()
        if not moved:
            self._messages.discard()
            return loss
        with self._timer.stage("reduce_scatter"):
            self._messages.fill()
            loss_scale = self._loss_scale
            if self._overflowed():
                self.skip_step()
                return loss
            self._messages.start()
            self._receive_averages(loss_scale)
        with self._timer.stage("all_gather"):
            gathered = [
                self.communicator.start_all_gather_v(buffer.data, buffer.counts, self._gradient_comm_dtype)
                for buffer in (message.buffer for message in self._messages.messages)
            ]
            for pending in gathered:
                pending.wait()
        with self._timer.stage("update"):
            views = [(p, view) for message in self._messages.messages for p, view in message.views if id(p) in moved]
            for parameter, _ in views:
                if parameter.grad is None:  # another rank has one
                    parameter.grad = torch.zeros_like(parameter)
            copy_all_([p.grad for p, _ in views if p.grad is not None], [view for _, view in views])
            self._move()
            rescale_weights_([weight for weight in self._rescaled if id(weight) in moved], self._weight_rescaling)
        return loss

    def _move(self) -> None:
        """Update the parameters by their `grad`, which is the average over the ranks."""
        # Without torch's wrappers: one loads the compiler at the first step, which takes a second, one turns gradients
        # off, as they are, and one, once an optimizer of torch's own was made, runs the hooks of `step` again.
        step: Any = super().step
        update = inspect.unwrap(step)
        if update is step:
            update()
        else:
            update(self)

"""SGD over the same communicator as K-FAC: the baseline."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.optim.agreement import agree_on_group, agree_on_step
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.guards import broadcast_model, check_arguments, clip_, placements, refuse_converted, refuse_sparse
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.step_report import StepReport
from kfac_dist.optim.update import rescale_weights_, rescaled_weights
from kfac_dist.optim.validation import check, check_choice, check_max_norm
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.timing import StageTimer
from kfac_dist.vocabulary import WeightRescaling


class SGD(DistributedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` that averages gradients over the ranks first; its settings mean what they mean there.

    At construction every rank takes rank 0's weights. As in torch, a parameter that has no gradient (None, on any
    rank) stays as it is, and a frozen one keeps its momentum.

    Attributes:
        report: What came of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        weight_rescaling: WeightRescaling = "off",
        max_grad_norm: float | None = None,
        loss_scaler: LossScaler | None = None,
        gradient_comm_dtype: torch.dtype | None = None,
        timer: StageTimer | None = None,
    ) -> None:
        """Set up; collective.

        Args:
            model: The network, on its device.
            communicator: Collectives over the ranks; made by `create_communicator()` if None.
            params: What to train, as for any torch optimizer; all of the model's parameters if None.
            lr: As in `torch.optim.SGD`, and so the next two.
            momentum: Of the gradient.
            weight_decay: L2 penalty.
            weight_rescaling: Eq. 18, as in `KFAC`.
            max_grad_norm: Norm that the *averaged*, unscaled gradient is clipped to; None does not clip.
            loss_scaler: For fp16, what each loss is scaled with before its backward.
            gradient_comm_dtype: Half precision in which gradients are sent; None sends them as they are.
            timer: Charged with the stages' seconds.

        Raises:
            TypeError: If something else than a model or a communicator is given for one, or the model is sharded or
                complex.
            ValueError: If a setting is out of range, nothing is to be trained, the ranks' models differ, or the loss
                scaler serves another optimizer.
        """
        self.communicator = check_arguments("SGD", model, communicator)
        parameters = model.parameters() if params is None else params
        check_choice("weight_rescaling", weight_rescaling, get_args(WeightRescaling))
        check_max_norm(max_grad_norm)
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.report = StepReport()
        self._timer = timer or StageTimer.off()
        self._weight_rescaling: WeightRescaling = weight_rescaling
        self._max_grad_norm = max_grad_norm
        self._loss_scaler = loss_scaler
        self._gradient_comm_dtype = gradient_comm_dtype
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._rescalable = list(rescaled_weights(model))
        self._trained: list[Parameter] = []
        self._follow_freezing()
        check("params", bool(self._trained), "none", "parameters that are not frozen")
        self._placements = placements(self._parameters(), self._names)
        if loss_scaler is not None:
            loss_scaler.serve(self)
        broadcast_model(model, self.communicator, self._parameters())

    def _parameters(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _follow_freezing(self) -> None:
        """Lay out the buffer for the parameters that are trained now; users freeze, unfreeze and add."""
        given = self._parameters()
        trained = [parameter for parameter in given if parameter.requires_grad]
        for parameter in given:
            if not parameter.requires_grad:
                parameter.grad = None  # or torch's SGD would go on with what is left of it
        if len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained)):
            return
        self._trained = trained
        known = {id(parameter) for parameter in trained}
        self._rescaled = [weight for weight in self._rescalable if id(weight) in known]
        double = any(parameter.dtype == torch.float64 for parameter in trained)
        numels = [parameter.numel() for parameter in trained]
        # Never half precision: MPI cannot add it, and sums over ranks would round.
        dtype, device = torch.float64 if double else torch.float32, given[0].device
        self._gradients = torch.zeros(sum(numels), dtype=dtype, device=device)
        parts = self._gradients.split(numels) if numels else ()
        self._views = [part.view(parameter.shape) for part, parameter in zip(parts, trained, strict=True)]
        total, size = self._gradients.numel(), self.communicator.size
        self._counts = [total * (rank + 1) // size - total * rank // size for rank in range(size)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; collective once the optimizer is made: they take rank 0's values."""
        super().add_param_group(param_group)
        if hasattr(self, "_trained"):
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
            ValueError: If a gradient is sparse, the model was converted, or other parameters are frozen on other ranks.
            RuntimeError: After `close`.
        """
        self.refuse_closed()
        self.refuse_grad_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_converted(self._parameters(), self._placements, self._names)
        self._follow_freezing()
        moved = agree_on_step(self._parameters(), self._names, self.communicator).with_gradient
        self.report = StepReport()
        if not moved:
            return loss
        with self._timer.stage("reduce_scatter"):
            for parameter in self._trained:
                if parameter.grad is not None:
                    refuse_sparse(self._names.get(id(parameter), "a parameter"), parameter.grad)
            copy_all_(self._views, [parameter.grad for parameter in self._trained])
            loss_scale = self._loss_scaler.scale if self._loss_scaler is not None else 1.0
            if self._loss_scaler is not None and self._loss_scaler.overflowed([self._gradients], self.communicator):
                self.report = StepReport(skipped=True)
                return loss
            own = self.communicator.reduce_scatter_v(self._gradients, self._counts, self._gradient_comm_dtype)
            if loss_scale != 1:
                own.mul_(1.0 / loss_scale)
            if self._max_grad_norm is not None:
                clip_([own], own.double().square().sum(), self._max_grad_norm, self.communicator)
        with self._timer.stage("all_gather"):
            self.communicator.all_gather_v(self._gradients, self._counts, self._gradient_comm_dtype)
        with self._timer.stage("update"):
            averages = [(p, view) for p, view in zip(self._trained, self._views, strict=True) if id(p) in moved]
            for parameter, _ in averages:
                if parameter.grad is None:  # another rank has one
                    parameter.grad = torch.zeros_like(parameter)
            copy_all_([p.grad for p, _ in averages if p.grad is not None], [view for _, view in averages])
            super().step()
            rescale_weights_([weight for weight in self._rescaled if id(weight) in moved], self._weight_rescaling)
        return loss

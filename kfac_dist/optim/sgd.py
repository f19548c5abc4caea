"""SGD over the same communicator as K-FAC: the baseline."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import nn

from kfac_dist.communicator import Communicator, create_communicator
from kfac_dist.curvature.blocks.base import FactorKey
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.step_report import StepReport
from kfac_dist.optim.update import WeightRescaling, rescale_weights_, rescaled_weights
from kfac_dist.optim.validation import check, check_choice
from kfac_dist.tensors.foreach import copy_all_
from kfac_dist.timing import StageTimer


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` that averages gradients over the ranks first; its settings mean what they mean there.

    At construction every rank takes rank 0's weights.

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
            weight_rescaling: Eq. 18, as in `KFAC`, and so the next two.
            loss_scaler: For fp16, what each loss is scaled with before its backward.
            gradient_comm_dtype: Half precision that gradients travel in between ranks.
            timer: Charged with the stages' seconds.

        Raises:
            ValueError: If a setting is out of range, or nothing is to be trained.
        """
        check_choice("weight_rescaling", weight_rescaling, get_args(WeightRescaling))
        parameters = model.parameters() if params is None else params
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.communicator = communicator if communicator is not None else create_communicator()
        self._timer = timer or StageTimer.off()
        self._weight_rescaling: WeightRescaling = weight_rescaling
        self._loss_scaler = loss_scaler
        self._gradient_comm_dtype = gradient_comm_dtype
        self._trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        check("params", bool(self._trained), "none", "parameters that are not frozen")
        self.report = StepReport()
        trained = {id(parameter) for parameter in self._trained}
        self._rescaled = [weight for weight in rescaled_weights(model) if id(weight) in trained]
        self._gradients = torch.cat([torch.zeros_like(parameter).flatten() for parameter in self._trained])
        parts = self._gradients.split([parameter.numel() for parameter in self._trained])
        self._views = [part.view(parameter.shape) for part, parameter in zip(parts, self._trained, strict=True)]
        total, size = self._gradients.numel(), self.communicator.size
        self._counts = [total * (rank + 1) // size - total * rank // size for rank in range(size)]
        for tensor in (*model.parameters(), *model.buffers()):
            self.communicator.broadcast_(tensor.data)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, update, rescale; collective.

        Args:
            closure: Computes the loss and its gradients again, under `enable_grad`; optional.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._timer.stage("reduce_scatter"):
            copy_all_(self._views, [parameter.grad for parameter in self._trained])
            if self._loss_scaler is not None:
                loss_scale = self._loss_scaler.scale
                if self._loss_scaler.overflowed([self._gradients], self.communicator):
                    self.report = StepReport(skipped=True)
                    return loss
            own = self.communicator.reduce_scatter_v(self._gradients, self._counts, self._gradient_comm_dtype)
            if self._loss_scaler is not None:
                own.mul_(1.0 / loss_scale)
        with self._timer.stage("all_gather"):
            self.communicator.all_gather_v(self._gradients, self._counts, self._gradient_comm_dtype)
        with self._timer.stage("update"):
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            copy_all_([parameter.grad for parameter in self._trained], self._views)
            super().step()
            rescale_weights_(self._rescaled, self._weight_rescaling)
        self.report = StepReport()
        return loss

    def describe(self) -> list[str]:
        """Nothing to say for the log; see `KFAC.describe`."""
        return []

    def spectra(self) -> dict[FactorKey, tuple[float, float, float]]:
        """Of no matrices; see `KFAC.spectra`."""
        return {}

"""SGD over the same communicator as K-FAC: the baseline."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kfac_dist.communicator import Communicator
from kfac_dist.optim.averaged import AveragedOptimizer, Averaging
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.optim.settings import refuse_as_attributes
from kfac_dist.timing import StageTimer
from kfac_dist.vocabulary import WeightRescaling


@refuse_as_attributes
class SGD(AveragedOptimizer, torch.optim.SGD):
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
        nesterov: bool = False,
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
            lr: As in `torch.optim.SGD`, and so the next three.
            momentum: Of the gradient.
            weight_decay: L2 penalty.
            nesterov: Nesterov's form of the momentum.
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
        averaging = Averaging(weight_rescaling, max_grad_norm, loss_scaler, gradient_comm_dtype, timer)
        parameters = self._check(model, communicator, params, averaging)
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        self._start(model, averaging)

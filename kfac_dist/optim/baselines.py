"""What K-FAC is compared with besides SGD: AdamW, LARS and Muon, over the same communicator."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator import Communicator
from kfac_dist.optim.averaged import DEFAULT_AVERAGING, AveragedOptimizer, Averaging
from kfac_dist.optim.settings import refuse_as_attributes
from kfac_dist.optim.update import rescaled_weights
from kfac_dist.optim.validation import check_positive


@refuse_as_attributes
class AdamW(AveragedOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` (Loshchilov and Hutter, ICLR 2019) of the averaged gradient."""

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        averaging: Averaging = DEFAULT_AVERAGING,
    ) -> None:
        """Set up; collective. The keywords up to `weight_decay`, which is decoupled, are torch's.

        Raises:
            TypeError: As `SGD`.
            ValueError: As `SGD`.
        """
        parameters = self._check(model, communicator, params, averaging)
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._start(model, averaging)


@refuse_as_attributes
class LARS(AveragedOptimizer, torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, 2017, Algorithm 1).

    With ∇ the averaged gradient of a weight w of a linear or convolution layer and β the weight decay:

        λ = trust_coefficient · ‖w‖ / (‖∇‖ + β‖w‖)
        v ← m·v + λ(∇ + βw);   w ← w − lr·v

    λ is 1 where either norm is zero. Biases and BatchNorm are updated as by SGD, as is usual with LARS. The learning
    rate multiplies v rather than what is added to it, as everywhere in torch: the same where it is constant.
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        averaging: Averaging = DEFAULT_AVERAGING,
    ) -> None:
        """Set up; collective.

        Args:
            model: The network, on its device.
            communicator: Collectives over the ranks; made by `create_communicator()` if None.
            params: What to train; all of the model's parameters if None.
            lr: Learning rate, the same for all layers.
            momentum: m.
            weight_decay: β.
            nesterov: Nesterov's form of the momentum.
            trust_coefficient: > 0.
            averaging: How gradients are averaged, and the weights rescaled.

        Raises:
            TypeError: As `SGD`.
            ValueError: As `SGD`.
        """
        check_positive("trust_coefficient", trust_coefficient)
        parameters = self._check(model, communicator, params, averaging)
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        self._trust_coefficient = trust_coefficient
        self._start(model, averaging, trust_coefficient=trust_coefficient)

    def _look_at_layers(self) -> None:
        super()._look_at_layers()
        self._scaled = {id(weight) for weight in self._rescalable}

    def _move(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0  # is in the gradient already
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._add_decay_and_scale_(parameter, decay)
        try:
            super()._move()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _add_decay_and_scale_(self, parameter: Parameter, decay: float) -> None:
        assert parameter.grad is not None
        norm, gradient_norm = parameter.norm(), parameter.grad.norm()
        parameter.grad.add_(parameter, alpha=decay)
        if id(parameter) in self._scaled:
            trust = self._trust_coefficient * norm / (gradient_norm + decay * norm)
            parameter.grad.mul_(torch.where((norm > 0) & (gradient_norm > 0), trust, 1.0))


@refuse_as_attributes
class Muon(AveragedOptimizer):
    """`torch.optim.Muon` (Jordan et al., 2024) for the weights of linear and convolution layers, SGD for all else.

    Muon orthogonalises the momentum of a matrix; a convolution's weight is the matrix (d_out, d_in · kernel height ·
    kernel width). Biases and BatchNorm move by `torch.optim.SGD` with Nesterov momentum, at a learning rate of their
    own. torch orthogonalises in bfloat16, whatever the precision of the weights. Every rank does so for all layers.
    """

    def __init__(
        self,
        model: nn.Module,
        communicator: Communicator | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        others_lr: float = 0.1,
        averaging: Averaging = DEFAULT_AVERAGING,
    ) -> None:
        """Set up; collective.

        Args:
            model: The network, on its device.
            communicator: Collectives over the ranks; made by `create_communicator()` if None.
            params: What to train, parameters or groups; all of the model's parameters if None. A group is split where
                it holds both kinds of parameters.
            lr: Learning rate of the matrices.
            momentum: Of matrices and all else.
            weight_decay: Decoupled for the matrices, an L2 penalty for all else.
            nesterov: Nesterov's form of the momentum, for the matrices.
            newton_schulz_steps: Of the orthogonalisation.
            others_lr: Learning rate of all else. Its ratio to `lr` is the `lr_ratio` of their parameter group.
            averaging: How gradients are averaged, and the weights rescaled.

        Raises:
            TypeError: As `SGD`.
            ValueError: As `SGD`.
        """
        given = list(self._check(model, communicator, params, averaging))
        check_positive("lr", lr)
        check_positive("others_lr", others_lr)
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov,
            "ns_steps": newton_schulz_steps, "lr_ratio": 1.0,
        }  # fmt: skip
        self._is_matrix = {id(weight) for weight in rescaled_weights(model)}
        self._others = {"lr": others_lr, "lr_ratio": others_lr / lr}
        super().__init__(given, defaults)
        self._start(model, averaging)

    def _look_at_layers(self) -> None:
        super()._look_at_layers()
        self._is_matrix = {id(weight) for weight in self._rescalable}

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group's matrices and its other parameters, those that there are."""
        given = group["params"]
        parameters = [given] if isinstance(given, Tensor) else list(given)  # as torch, also with their names
        kinds = [id(each[1] if isinstance(each, tuple) else each) in self._is_matrix for each in parameters]
        matrices = [each for each, is_matrix in zip(parameters, kinds, strict=True) if is_matrix]
        rest = [each for each, is_matrix in zip(parameters, kinds, strict=True) if not is_matrix]
        parts = [{**group, "params": matrices}, {**self._others, **group, "params": rest}]
        return [part for part in parts if part["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, in two groups where they are of both kinds; see `SGD`."""
        if hasattr(self, "_trained"):
            self._look_at_layers()
        for part in self._split(param_group):
            super().add_param_group(part)

    def _move(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            common = {"lr": group["lr"], "momentum": group["momentum"], "weight_decay": group["weight_decay"]}
            if id(parameters[0]) not in self._is_matrix:
                sgd = torch.optim.SGD(parameters, **common, nesterov=group["momentum"] > 0)
                self._step_with_own_state(sgd, parameters, parameters)
                continue
            matrices = [_as_matrix(parameter) for parameter in parameters]
            muon = torch.optim.Muon(matrices, **common, nesterov=group["nesterov"], ns_steps=group["ns_steps"])
            self._step_with_own_state(muon, matrices, parameters)
            for parameter, matrix in zip(parameters, matrices, strict=True):
                parameter.copy_(matrix.view_as(parameter))

    def _step_with_own_state(
        self, optimizer: torch.optim.Optimizer, moved: list[Parameter], parameters: list[Parameter]
    ) -> None:
        """One step of an optimizer that lives for it, with the state that this one keeps for the parameters."""
        for each, parameter in zip(moved, parameters, strict=True):
            optimizer.state[each] = self.state[parameter]
        optimizer.step()


def _as_matrix(weight: Parameter) -> Parameter:
    """A copy of a layer's weight, (d_out, all else), with its gradient; of any memory format."""
    assert weight.grad is not None
    matrix = Parameter(weight.detach().reshape(len(weight), -1).clone())
    matrix.grad = weight.grad.reshape(len(weight), -1)
    return matrix

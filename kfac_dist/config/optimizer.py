"""The section `optimizer`: a union by `name`, each optimizer with its own keys."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.sections import Kind
from kfac_dist.vocabulary import Decayed


class Optimizer(Kind):
    """Settings that all optimizers have.

    `learning_rate` is that of the schedule's peak. `decayed` says what `weight_decay` applies to: all parameters, or
    the weights of linear and convolution layers alone, so that biases and BatchNorm are left as they are.
    """

    name: str
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegativeFloat = 0.0
    decayed: Decayed = "all"


class KfacOptimizer(Optimizer):
    """K-FAC; what else it needs is in the section `kfac`. The momentum follows the learning rate (Eq. 16)."""

    name: Literal["kfac"]


class SgdOptimizer(Optimizer):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`."""

    name: Literal["sgd"]
    nesterov: bool = False

    @field_validator("nesterov")
    @classmethod
    def _check_nesterov(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be false when optimizer.momentum is 0")
        return nesterov


class MuonOptimizer(Optimizer):
    """Muon for the weights of linear and convolution layers, SGD with Nesterov momentum for all else.

    `others_learning_rate` is the peak for all else, which follows the same schedule. `newton_schulz_steps` are those
    of the orthogonalisation. Weight decay is decoupled for the weights that Muon moves.
    """

    name: Literal["muon"]
    nesterov: bool = True
    newton_schulz_steps: Annotated[PositiveInt, Field(lt=100)] = 5
    others_learning_rate: PositiveFloat = 0.1


class AdamwOptimizer(Optimizer):
    """AdamW, as `torch.optim.AdamW`: `momentum` is beta_1, and the weight decay is decoupled."""

    name: Literal["adamw"]
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: PositiveFloat = 1e-8


class LarsOptimizer(Optimizer):
    """LARS: each layer's weights move in proportion to their norm, `trust_coefficient` times the learning rate."""

    name: Literal["lars"]
    nesterov: bool = False
    trust_coefficient: PositiveFloat = 0.001


OptimizerConfig = Annotated[
    KfacOptimizer | SgdOptimizer | MuonOptimizer | AdamwOptimizer | LarsOptimizer, Field(discriminator="name")
]

"""The section `optimizer`: a union by `name`, each optimizer with its own keys."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from kfac_dist.config.sections import Kind
from kfac_dist.vocabulary import Decayed


class Optimizer(Kind):
    """Settings that all optimizers have."""

    name: str
    """Which one, and so which keys there are."""
    learning_rate: PositiveFloat
    """Initial learning rate, that of epoch 0 (Eq. 15), or the peak of a schedule that rises first."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum; under K-FAC the initial one, which then goes with the learning rate (Eq. 16); beta_1 of AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """Times the weight, added to the gradient (before preconditioning); decoupled under AdamW, and Muon's matrices."""
    decayed: Decayed = "all"
    """What is decayed: all, or only weights of linear and convolution layers, not biases and BatchNorm."""


class KfacOptimizer(Optimizer):
    """K-FAC; what else it needs is in the section `kfac`. The momentum follows the learning rate (Eq. 16)."""

    name: Literal["kfac"]


class SgdOptimizer(Optimizer):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`."""

    name: Literal["sgd"]
    nesterov: bool = False
    """Nesterov's form of the momentum."""

    @field_validator("nesterov")
    @classmethod
    def _check_nesterov(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be false when optimizer.momentum is 0")
        return nesterov


class MuonOptimizer(Optimizer):
    """Muon for the weights of linear and convolution layers, SGD with Nesterov momentum for all else.

    Weight decay is decoupled for the weights that Muon moves.
    """

    name: Literal["muon"]
    nesterov: bool = True
    """Nesterov's form of the momentum, for the matrices."""
    newton_schulz_steps: Annotated[PositiveInt, Field(lt=100)] = 5
    """Steps of the orthogonalisation."""
    others_learning_rate: PositiveFloat = 0.1
    """Initial learning rate of biases and BatchNorm, which follows the same schedule."""


class AdamwOptimizer(Optimizer):
    """AdamW, as `torch.optim.AdamW`: `momentum` is beta_1, and the weight decay is decoupled."""

    name: Literal["adamw"]
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running average."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""


class LarsOptimizer(Optimizer):
    """LARS: each layer's weights move in proportion to their norm, `trust_coefficient` times the learning rate."""

    name: Literal["lars"]
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    trust_coefficient: PositiveFloat = 0.001
    """Share of a layer's norm that a step of learning rate 1 moves it by."""


OptimizerConfig = Annotated[
    KfacOptimizer | SgdOptimizer | MuonOptimizer | AdamwOptimizer | LarsOptimizer, Field(discriminator="name")
]

"""One block of the Fisher for each layer: which matrices it has and the maths on them.

A block knows its layer's parameters and shapes, and nothing of ranks, buffers or schedules. Each of its matrices is a
stack of symmetric matrices (count, n, n) and has one of three names, which tell how calls and micro-batches add up:

    "A"   of the layer's inputs, summed over positions
    "G"   of the gradients at its outputs, averaged over positions
    "F"   of the parameters' gradients by sample

Gradients travel flat: the parameters' gradients one behind the other.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature.solvers import Solver
from kfac_dist.tensors.packing import pack_symmetric
from kfac_dist.vocabulary import BatchNormForm

FactorKey = tuple[str, str]  # (block name, matrix name: "A", "G" or "F")
Matrices = dict[str, Tensor]


class Block(ABC):
    """A layer's block of the Fisher.

    Attributes:
        name: The module's name in the model.
        module: The layer.
        parameters: The trained parameters that the block covers, in the order of the flat gradient.
        num_values: Values of the flat gradient.
        factor_shapes: For each matrix its (count, n); set by the subclass.
        form: One word for tables: how the Fisher is approximated.
        uses_batchnorm_damping: Whether the block is damped with ρ_BN·γ rather than γ.
        reason: Why the layer gets the plain gradient; empty where it is preconditioned.
    """

    factor_shapes: dict[str, tuple[int, int]]
    form: str
    uses_batchnorm_damping = False
    reason = ""

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[Parameter]):
        self.name = name
        self.module = module
        self.parameters = list(parameters)
        self.num_values = sum(parameter.numel() for parameter in self.parameters)
        own = {id(parameter) for parameter in self.parameters}
        self._places = {place: p for place, p in module._parameters.items() if id(p) in own}

    @property
    def is_in_place(self) -> bool:
        """Whether the layer uses the block's parameters as it did: none was replaced, pruned or parametrized since."""
        return all(self.module._parameters.get(place) is parameter for place, parameter in self._places.items())

    def is_like(self, other: "Block") -> bool:
        """Whether both are the same kind of block of the same parameters, so that one may go on for the other."""
        return (
            type(self) is type(other)
            and self.module is other.module
            and len(self.parameters) == len(other.parameters)
            and all(map(operator.is_, self.parameters, other.parameters))
        )

    @classmethod
    def create(cls, name: str, module: nn.Module, parameters: Sequence[Parameter], batchnorm: BatchNormForm) -> Self:
        """The block of a layer of this type; only BatchNorm's heeds the form that is asked for."""
        return cls(name, module, parameters)

    @classmethod
    def why_not(cls, module: nn.Module, trained: Sequence[Parameter]) -> str:
        """Why a layer of this type must get the plain gradient, or an empty string.

        Args:
            module: The layer.
            trained: Those of its own parameters that are trained; at least one.
        """
        return ""

    @property
    def is_preconditioned(self) -> bool:
        """Whether K-FAC covers the layer."""
        return not self.reason

    def batched(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """A call's input and output gradient with a first dimension of samples, where it had none."""
        return x, g

    @abstractmethod
    def factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None = None) -> Tensor:
        """The matrix as one call of the layer in training mode gives it.

        Args:
            matrix: A key of `factor_shapes`.
            x: The call's input, samples first.
            g: Gradient of the mean loss at the call's output, in the precision that the layer ran in.
            num_samples: N where it is not the size of the first dimension; BatchNorm's always is.

        Returns:
            (count, n, n), in fp32 where the layer ran in half precision.
        """

    def pack_factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None, out: Tensor) -> None:
        """`factor`, as upper triangles.

        Args:
            matrix: A key of `factor_shapes`.
            x: The call's input, samples first.
            g: Gradient of the mean loss at the call's output.
            num_samples: N where it is not the size of the first dimension, or None.
            out: (count·n(n+1)/2,), contiguous, of any precision; overwritten.
        """
        pack_symmetric(self.factor(matrix, x, g, num_samples).to(out.dtype), out=out)

    def pack_sampled_factor(
        self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None, fraction: float, out: Tensor
    ) -> None:
        """`pack_factor` from a part of the samples, where a block can do that; this one takes all.

        Args:
            matrix: A key of `factor_shapes`.
            x: The call's input, samples first.
            g: Gradient of the mean loss over *all* samples at the call's output.
            num_samples: N where it is not the size of the first dimension, or None.
            fraction: Of the samples, in (0, 1].
            out: (count·n(n+1)/2,), contiguous, of any precision; overwritten.
        """
        self.pack_factor(matrix, x, g, num_samples, out)

    @staticmethod
    @abstractmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        """What damping adds to diagonals, be it of one block or of several that share this function.

        Args:
            mean_diagonals: Mean diagonal entry of each matrix, (k,) by name.
            damping: gamma of each, (k,).

        Returns:
            (k,) by name.
        """

    @abstractmethod
    def arrange(self, gradient: Tensor) -> Tensor:
        """A flat gradient (num_values,) as the stack of matrices (count, rows, columns) that `solve` takes."""

    @abstractmethod
    def flatten(self, arranged: Tensor) -> Tensor:
        """Undo `arrange`."""

    @staticmethod
    @abstractmethod
    def solve(arranged: Tensor, solvers: Mapping[str, Solver]) -> Tensor:
        """Apply the inverse of the damped Fisher to a stack (count, rows, columns).

        Args:
            arranged: Gradients of one block, or of several of one shape that share this function.
            solvers: Solvers of their matrices by name.

        Returns:
            A stack of the same shape.
        """


def holds(module: nn.Module, parameter: Parameter) -> bool:
    """Whether the parameter is the module's, under whichever name, or a part's of it such as a parametrization."""
    return any(parameter is own for own in module.parameters())


def weight_and_bias(module: nn.Module, parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those of the parameters that are the layer's weight and bias, in this order.

    A layer may have registered its bias first, as after `prune.remove` or `remove_weight_norm`.
    """
    given = {id(parameter): parameter for parameter in parameters}
    own = [module._parameters.get(name) for name in ("weight", "bias")]
    return [given[id(parameter)] for parameter in own if id(parameter) in given]


def computed_from_others(name: str) -> str:
    """The reason where something stands between what is trained and what the layer uses under this name."""
    return f"its {name} is computed from other parameters: weight_norm, pruning or a parametrization"


def why_not_weight_and_bias(module: nn.Module) -> str:
    """Why the layer's parameters are not just a weight and a bias that hold values, or an empty string."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    for name in ("weight", "bias"):
        if name not in module._parameters and getattr(module, name, None) is not None:
            return computed_from_others(name)
    extra = [name for name in names if name not in ("weight", "bias")]
    if extra:
        return f"it has parameters that its type does not have: {', '.join(extra)}"
    return "" if module.get_parameter("weight").numel() else "its weight has no values"

"""One block of the Fisher for each layer: which matrices it has and the maths on them.

A block knows its layer's parameters and shapes, and nothing of ranks, buffers or schedules. Matrices go by name,
"A" and "G" for a Kronecker-factored layer and "F" for BatchNorm; each is a stack of symmetric matrices (count, n, n).
Gradients travel flat: the parameters' gradients one behind the other.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature.solvers import Solver

FactorKey = tuple[str, str]  # (block name, matrix name: "A", "G" or "F")
Matrices = dict[str, Tensor]


class Block(ABC):
    """A layer's block of the Fisher.

    Attributes:
        name: The module's name in the model.
        module: The layer.
        parameters: The trainable parameters that the block covers, in the order of the flat gradient.
        factor_shapes: For each matrix its (count, n).
        form: One word for tables: how the Fisher is approximated.
    """

    form: str

    def __init__(
        self, name: str, module: nn.Module, parameters: Sequence[Parameter], factor_shapes: dict[str, tuple[int, int]]
    ):
        self.name = name
        self.module = module
        self.parameters = list(parameters)
        self.factor_shapes = factor_shapes
        self.num_values = sum(parameter.numel() for parameter in self.parameters)

    def is_like(self, other: "Block") -> bool:
        """Whether both are the same kind of block of the same parameters, so that one may go on for the other."""
        return (
            type(self) is type(other)
            and self.module is other.module
            and len(self.parameters) == len(other.parameters)
            and all(map(operator.is_, self.parameters, other.parameters))
        )

    @abstractmethod
    def factor(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
        """The matrix as one call of the layer in training mode gives it.

        Args:
            matrix: A key of `factor_shapes`.
            x: The call's input.
            g: Gradient of the mean loss at the call's output, in the precision that the layer ran in.

        Returns:
            (count, n, n), in fp32 where the layer ran in half precision.
        """

    @staticmethod
    @abstractmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        """What damping adds to diagonals, be it of one block or several.

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
        """Apply the inverse of the damped Fisher to a stack (count, rows, columns), be it of one block or several."""

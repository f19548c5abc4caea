"""Parameters without a K-FAC form."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature.blocks.base import Block, Matrices, holds
from kfac_dist.curvature.solvers import Solver


class IdentityBlock(Block):
    """Parameters that K-FAC does not cover: the Fisher is the identity, so they get the plain gradient."""

    form = "plain"

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[Parameter], reason: str):
        super().__init__(name, module, parameters)
        self.reason = reason
        self.factor_shapes = {}

    @property
    def is_in_place(self) -> bool:
        return super().is_in_place or all(holds(self.module, parameter) for parameter in self.parameters)

    def factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None = None) -> Tensor:
        raise AssertionError(f"{self.name} has no Fisher matrices")

    @staticmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        return {}

    def arrange(self, gradient: Tensor) -> Tensor:
        return gradient.view(1, 1, -1)

    def flatten(self, arranged: Tensor) -> Tensor:
        return arranged.flatten()

    @staticmethod
    def solve(arranged: Tensor, solvers: Mapping[str, Solver]) -> Tensor:
        return arranged

"""BatchNorm layers: the exact empirical Fisher of scale and shift."""

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature.batchnorm import (
    batchnorm_fisher,
    join_gradient,
    split_gradient,
    stack_shape,
)
from kfac_dist.curvature.blocks.base import Block, Matrices, weight_and_bias, why_not_weight_and_bias
from kfac_dist.curvature.solvers import Solver, precondition_vectors
from kfac_dist.vocabulary import BatchNormForm


class BatchNormBlock(Block):
    """BatchNorm1d or 2d: the exact empirical Fisher of scale and shift, in one of three forms."""

    uses_batchnorm_damping = True

    def __init__(
        self, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, parameters: Sequence[Parameter], form: BatchNormForm
    ):
        super().__init__(name, module, weight_and_bias(module, parameters))
        self.form: BatchNormForm = form
        self.module: nn.BatchNorm1d | nn.BatchNorm2d = module
        self.factor_shapes = {"F": stack_shape(module.num_features, form)}

    @classmethod
    def create(cls, name: str, module: nn.Module, parameters: Sequence[Parameter], batchnorm: BatchNormForm) -> Self:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        return cls(name, module, parameters, batchnorm)

    @classmethod
    def why_not(cls, module: nn.Module, trained: Sequence[Parameter]) -> str:
        reason = why_not_weight_and_bias(module)
        if reason or len(weight_and_bias(module, trained)) == 2:
            return reason
        return "scale or shift is frozen or not given to the optimizer"

    def factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None = None) -> Tensor:
        return batchnorm_fisher(x, g, self.module.eps, self.form)

    @staticmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        return {"F": damping}

    def arrange(self, gradient: Tensor) -> Tensor:
        return split_gradient(gradient, self.form)[..., None]

    def flatten(self, arranged: Tensor) -> Tensor:
        return join_gradient(arranged[..., 0], self.form)

    @staticmethod
    def solve(arranged: Tensor, solvers: Mapping[str, Solver]) -> Tensor:
        return precondition_vectors(arranged, solvers["F"])

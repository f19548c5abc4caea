"""BatchNorm layers: the exact empirical Fisher of scale and shift."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature import batchnorm
from kfac_dist.curvature.blocks.base import Block, Matrices
from kfac_dist.curvature.solvers import Solver, precondition_vectors
from kfac_dist.vocabulary import BatchNormForm


class BatchNormBlock(Block):
    """BatchNorm1d or 2d: the exact empirical Fisher of scale and shift, in one of three forms."""

    def __init__(
        self, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, parameters: Sequence[Parameter], form: BatchNormForm
    ):
        self.form: BatchNormForm = form
        self.eps = module.eps
        super().__init__(name, module, parameters, {"F": batchnorm.stack_shape(module.num_features, form)})

    def factor(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
        return batchnorm.batchnorm_fisher(x, g, self.eps, self.form)

    @staticmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        return {"F": damping}

    def arrange(self, gradient: Tensor) -> Tensor:
        return batchnorm.split_gradient(gradient, self.form)[..., None]

    def flatten(self, arranged: Tensor) -> Tensor:
        return batchnorm.join_gradient(arranged[..., 0], self.form)

    @staticmethod
    def solve(arranged: Tensor, solvers: Mapping[str, Solver]) -> Tensor:
        return precondition_vectors(arranged, solvers["F"])

"""Linear and Conv2d layers: F ≈ G ⊗ A."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature import factors
from kfac_dist.curvature.blocks.base import Block, Matrices
from kfac_dist.curvature.solvers import Solver, damping_shifts, precondition_kronecker


class KroneckerBlock(Block):
    """Linear or Conv2d: F ≈ G ⊗ A, one such block for each group of a convolution."""

    form = "kronecker"

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, parameters: Sequence[Parameter]):
        weight = module.weight
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.has_bias = len(parameters) == 2
        self.rows = weight.shape[0] // self.groups
        self.columns = weight[0].numel()
        factor_shapes = {"A": (self.groups, self.columns + self.has_bias), "G": (self.groups, self.rows)}
        super().__init__(name, module, parameters, factor_shapes)

    def factor(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
        layer = self.module
        x = x.to(g.dtype)  # autocast casts the layer's input, too, to the precision that it runs in
        if x.dim() == (1 if isinstance(layer, nn.Linear) else 3):  # one sample without a batch dimension
            x, g = x[None], g[None]
        if isinstance(layer, nn.Linear):
            if matrix == "A":
                return factors.linear_input_factor(x, self.has_bias)
            return factors.linear_output_factor(g)
        assert isinstance(layer, nn.Conv2d)
        if matrix == "G":
            return factors.conv2d_output_factor(g, layer.groups)
        return factors.conv2d_input_factor(
            x,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),  # type: ignore[arg-type]
            _pair(layer.dilation),
            layer.groups,
            self.has_bias,
            layer.padding_mode,
        )

    @staticmethod
    def shifts(mean_diagonals: Matrices, damping: Tensor) -> Matrices:
        shift_A, shift_G = damping_shifts(mean_diagonals["A"], mean_diagonals["G"], damping)
        return {"A": shift_A, "G": shift_G}

    def arrange(self, gradient: Tensor) -> Tensor:
        if not self.has_bias:
            return gradient.view(self.groups, self.rows, self.columns)
        weight, bias = gradient.split([self.groups * self.rows * self.columns, self.groups * self.rows])
        return torch.cat([weight.view(self.groups, self.rows, -1), bias.view(self.groups, self.rows, 1)], dim=2)

    def flatten(self, arranged: Tensor) -> Tensor:
        if not self.has_bias:
            return arranged.flatten()
        return torch.cat([part.flatten() for part in arranged.split([self.columns, 1], dim=2)])

    @staticmethod
    def solve(arranged: Tensor, solvers: Mapping[str, Solver]) -> Tensor:
        return precondition_kronecker(arranged, solvers["A"], solvers["G"])


def _pair(value: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = value
    return vertical, horizontal

"""Layers whose weight multiplies their input at every position: F ≈ G ⊗ A."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature.blocks.base import Block, Matrices, weight_and_bias, why_not_weight_and_bias
from kfac_dist.curvature.factors import input_factor, output_factor, second_moment
from kfac_dist.curvature.solvers import Solver, damping_shifts, precondition_kronecker


def num_taken(fraction: float, num_samples: int) -> int:
    """How many of a call's samples A and G are computed from: the fraction of them, rounded up, and at least one.

    Args:
        fraction: In (0, 1].
        num_samples: N, ≥ 1.
    """
    return max(1, math.ceil(fraction * num_samples - 1e-9))  # 0.1 · 30 is 3.0000000000000004


class KroneckerBlock(Block):
    """F ≈ G ⊗ A, one such block for each group of the layer.

    A layer type's own class says how its inputs and output gradients become rows. The layer has a `weight` of shape
    (output features, *) and a `bias` or none, and no other parameters.

    Attributes:
        sample_dims: Dimensions of one sample's input; a call with no more than these has no batch dimension.
        groups: Groups of the layer.
        rows: Output features of each group.
        columns: Weights of each output feature.
        has_bias: Whether the bias is trained, so that A has a row for it.
    """

    form = "kronecker"
    sample_dims: int

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[Parameter], groups: int = 1):
        super().__init__(name, module, weight_and_bias(module, parameters))
        weight = module.get_parameter("weight")
        self.groups = groups
        self.has_bias = any(parameter is module._parameters.get("bias") for parameter in parameters)
        self.rows = weight.shape[0] // groups
        self.columns = weight[0].numel()
        self.factor_shapes = {"A": (groups, self.columns + self.has_bias), "G": (groups, self.rows)}

    @classmethod
    def why_not(cls, module: nn.Module, trained: Sequence[Parameter]) -> str:
        reason = why_not_weight_and_bias(module)
        if reason or any(parameter is module.weight for parameter in trained):
            return reason
        return "the weight is frozen or not given to the optimizer"

    @abstractmethod
    def feature_rows(self, values: Tensor) -> Tensor:
        """The layer's inputs or output gradients, one row a position: (N, …) → (groups, N·T, features/groups)."""

    def input_moment(self, x: Tensor) -> Tensor:
        """Σ_n Σ_t a aᵀ of the layer's input, (groups, n, n)."""
        return second_moment(self.feature_rows(x), self.has_bias)

    def output_moment(self, g: Tensor) -> Tensor:
        """Σ_n Σ_t g gᵀ of the gradients at the layer's output, (groups, n, n)."""
        return second_moment(self.feature_rows(g))

    def batched(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (x[None], g[None]) if x.dim() == self.sample_dims else (x, g)

    def factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None = None) -> Tensor:
        num_samples = num_samples or g.shape[0]
        if matrix == "A":
            # Autocast casts the layer's input, too, to the precision that it runs in.
            return input_factor(self.input_moment(x.to(g.dtype)), num_samples)
        num_rows = g.numel() // (self.groups * self.rows)
        return output_factor(self.output_moment(g), num_samples, num_rows)

    def pack_sampled_factor(
        self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None, fraction: float, out: Tensor
    ) -> None:
        """`pack_factor` from the first samples; from all where they do not lie in the first dimension."""
        if fraction == 1 or num_samples is not None:
            self.pack_factor(matrix, x, g, num_samples, out)
            return
        count = num_taken(fraction, len(g))
        self.pack_factor(matrix, x[:count], g[:count], None, out)
        if matrix == "G":
            out.mul_((len(g) / count) ** 2)  # whose gradients are of the mean over all samples

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

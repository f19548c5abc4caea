"""Random tensors, and the factors of a Linear or Conv2d layer for arguments alone."""

import torch
from torch import Tensor, nn

from kfac_dist.curvature.blocks.create import create_blocks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_input_factor(x: Tensor, bias: bool) -> Tensor:
    return _factor(nn.Linear(x.shape[-1], 1, bias), "A", x)


def linear_output_factor(g: Tensor) -> Tensor:
    return _factor(nn.Linear(1, g.shape[-1]), "G", g)


def conv2d_input_factor(x, kernel_size, stride, padding, dilation, groups, bias, padding_mode="zeros") -> Tensor:
    layer = nn.Conv2d(x.shape[1], groups, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
    return _factor(layer, "A", x)


def conv2d_output_factor(g: Tensor, groups: int) -> Tensor:
    return _factor(nn.Conv2d(groups, g.shape[1], 1, groups=groups), "G", g)


def _factor(layer: nn.Module, matrix: str, values: Tensor) -> Tensor:
    """A of an input or G of an output gradient; what the other would be changes nothing but N."""
    (block,) = create_blocks(layer, list(layer.parameters()), "full")
    return block.factor(matrix, values, values)

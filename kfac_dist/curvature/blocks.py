"""One block of the Fisher for each layer: which matrices it has and the maths on them.

A block knows its layer's parameters and shapes, and nothing of ranks, buffers or schedules. Matrices go by name,
"A" and "G" for a Kronecker-factored layer and "F" for BatchNorm; each is a stack of symmetric matrices (count, n, n).
Gradients travel flat: the parameters' gradients one behind the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.communicator.packing import triangle_numel
from kfac_dist.curvature import batchnorm, factors, inverse
from kfac_dist.curvature.assignment import Work, inversion_flops
from kfac_dist.curvature.batchnorm import BatchNormForm
from kfac_dist.curvature.inverse import Solver
from kfac_dist.curvature.staleness import StatisticKey
from kfac_dist.errors import InputError

Matrices = dict[str, Tensor]


class Block(ABC):
    """A layer's block of the Fisher.

    Attributes:
        name: The module's name in the model.
        module: The layer.
        parameters: The trainable parameters that the block covers, in the order of the flat gradient.
        stacks: For each matrix its (count, n).
        form: One word for tables: how the Fisher is approximated.
    """

    form: str

    def __init__(
        self, name: str, module: nn.Module, parameters: Sequence[Parameter], stacks: dict[str, tuple[int, int]]
    ):
        self.name = name
        self.module = module
        self.parameters = list(parameters)
        self.stacks = stacks
        self.num_values = sum(parameter.numel() for parameter in self.parameters)

    @abstractmethod
    def statistic(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
        """The matrix as one call of the layer in training mode gives it.

        Args:
            matrix: A key of `stacks`.
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


class KroneckerBlock(Block):
    """Linear or Conv2d: F ≈ G ⊗ A, one such block for each group of a convolution."""

    form = "kronecker"

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, parameters: Sequence[Parameter]):
        weight = module.weight
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.has_bias = len(parameters) == 2
        self.rows = weight.shape[0] // self.groups
        self.columns = weight[0].numel()
        stacks = {"A": (self.groups, self.columns + self.has_bias), "G": (self.groups, self.rows)}
        super().__init__(name, module, parameters, stacks)

    def statistic(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
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
        shift_A, shift_G = inverse.damping_shifts(mean_diagonals["A"], mean_diagonals["G"], damping)
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
        return inverse.precondition_kronecker(arranged, solvers["A"], solvers["G"])


class BatchNormBlock(Block):
    """BatchNorm1d or 2d: the exact empirical Fisher of scale and shift, in one of three forms."""

    def __init__(
        self, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, parameters: Sequence[Parameter], form: BatchNormForm
    ):
        self.form: BatchNormForm = form
        self.eps = module.eps
        super().__init__(name, module, parameters, {"F": batchnorm.stack_shape(module.num_features, form)})

    def statistic(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
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
        return inverse.precondition_vectors(arranged, solvers["F"])


class PlainBlock(Block):
    """Parameters that K-FAC does not cover: the Fisher is the identity, so they get the plain gradient.

    Attributes:
        reason: Why they are not covered.
    """

    form = "plain"

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[Parameter], reason: str):
        self.reason = reason
        super().__init__(name, module, parameters, {})

    def statistic(self, matrix: str, x: Tensor, g: Tensor) -> Tensor:
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


def create_blocks(
    model: nn.Module, trained: Collection[Parameter], form: BatchNormForm, skip: Sequence[str] = ()
) -> list[Block]:
    """A block for every layer of the model that owns parameters, in the order of `model.named_modules()`.

    Args:
        model: The network.
        trained: Parameters that the optimizer was given; others get no block.
        form: Form of the BatchNorm Fisher.
        skip: Shell-style patterns of module names that shall get the plain gradient.

    Returns:
        Blocks; each trained parameter of the model is in exactly one.

    Raises:
        InputError: If a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"skip must hold patterns of the model's module names, got {pattern!r}, which fits none")
    wanted = {id(parameter) for parameter in trained}
    uses = _count_owners(model)
    claimed: set[int] = set()
    blocks: list[Block] = []
    for name, module in model.named_modules():
        own = [
            parameter
            for parameter in module.parameters(recurse=False)
            if id(parameter) in wanted - claimed and parameter.requires_grad
        ]
        if not own:
            continue
        claimed |= {id(parameter) for parameter in own}
        tied = any(uses[id(parameter)] > 1 for parameter in _direct_parameters(module))
        blocks.append(_create_block(name or "(root)", module, own, form, skip, tied))
    return blocks


def block_work(block: Block) -> Work:
    """What the block costs its owner, for `assign_owners`."""
    packed = sum(count * triangle_numel(size) for count, size in block.stacks.values())
    return Work(
        flops=inversion_flops(list(block.stacks.values()), block.num_values),
        num_bytes=4 * (packed + block.num_values),
    )


def refresh_costs(blocks: Sequence[Block]) -> dict[StatisticKey, float]:
    """Operations of factorising each matrix of the blocks."""
    return {
        (block.name, matrix): inversion_flops([stack], 0) for block in blocks for matrix, stack in block.stacks.items()
    }


def _create_block(
    name: str, module: nn.Module, own: list[Parameter], form: BatchNormForm, skip: Sequence[str], tied: bool
) -> Block:
    reason = _why_not_covered(name, module, own, skip, tied)
    if reason:
        return PlainBlock(name, module, own, reason)
    if isinstance(module, nn.Linear | nn.Conv2d):
        return KroneckerBlock(name, module, own)
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    return BatchNormBlock(name, module, own, form)


# Exact types: a subclass may compute something else in its forward, and must not be miscomputed without a word.
_COVERED_TYPES = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)


def _why_not_covered(name: str, module: nn.Module, own: list[Parameter], skip: Sequence[str], tied: bool) -> str:
    """The reason for the plain gradient, or an empty string."""
    if any(fnmatchcase(name, pattern) for pattern in skip):
        return "skipped by pattern"
    if type(module) not in _COVERED_TYPES:
        return f"{type(module).__name__} has no K-FAC form here"
    if tied:
        return "a parameter is shared with another layer"
    if not any(parameter is module.weight for parameter in own):
        return "the weight is frozen or not given to the optimizer"
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and len(own) != 2:
        return "scale or shift is frozen or not given to the optimizer"
    return ""


def _count_owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter (by id) directly."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in _direct_parameters(module):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _direct_parameters(module: nn.Module) -> Iterator[Parameter]:
    return (parameter for parameter in module._parameters.values() if parameter is not None)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = value
    return vertical, horizontal

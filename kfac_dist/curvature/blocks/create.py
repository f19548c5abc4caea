"""Which block each layer gets, and why some get none."""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from kfac_dist.curvature.assignment import LayerCost, inversion_flops
from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.blocks.batchnorm import BatchNormBlock
from kfac_dist.curvature.blocks.identity import IdentityBlock
from kfac_dist.curvature.blocks.kronecker import KroneckerBlock
from kfac_dist.errors import InputError
from kfac_dist.tensors.packing import triangle_numel
from kfac_dist.vocabulary import BatchNormForm


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


def block_cost(block: Block) -> LayerCost:
    """What the block costs its owner, for `assign_owners`."""
    packed = sum(count * triangle_numel(size) for count, size in block.factor_shapes.values())
    return LayerCost(
        flops=inversion_flops(list(block.factor_shapes.values()), block.num_values),
        num_bytes=4 * (packed + block.num_values),
    )


def refresh_costs(blocks: Sequence[Block]) -> dict[FactorKey, float]:
    """Operations of factorising each matrix of the blocks."""
    return {
        (block.name, matrix): inversion_flops([stack], 0)
        for block in blocks
        for matrix, stack in block.factor_shapes.items()
    }


def _create_block(
    name: str, module: nn.Module, own: list[Parameter], form: BatchNormForm, skip: Sequence[str], tied: bool
) -> Block:
    reason = _why_not_covered(name, module, own, skip, tied)
    if reason:
        return IdentityBlock(name, module, own, reason)
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

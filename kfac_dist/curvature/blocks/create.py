"""Which block each layer gets, and why some get none."""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from kfac_dist.curvature.assignment import LayerCost, inversion_flops
from kfac_dist.curvature.blocks.base import Block, FactorKey, computed_from_others
from kfac_dist.curvature.blocks.batchnorm import BatchNormBlock
from kfac_dist.curvature.blocks.conv2d import Conv2dBlock
from kfac_dist.curvature.blocks.identity import IdentityBlock
from kfac_dist.curvature.blocks.linear import LinearBlock
from kfac_dist.errors import InputError
from kfac_dist.tensors.packing import triangle_numel
from kfac_dist.vocabulary import BatchNormForm

# By exact type: a subclass may compute something else in its forward, and must not be miscomputed without a word.
BLOCK_TYPES: dict[type[nn.Module], type[Block]] = {
    nn.Linear: LinearBlock,
    nn.Conv2d: Conv2dBlock,
    nn.BatchNorm1d: BatchNormBlock,
    nn.BatchNorm2d: BatchNormBlock,
}
"""The block of each layer type that K-FAC covers."""


def create_blocks(
    model: nn.Module, trained: Collection[Parameter], form: BatchNormForm, skip: Sequence[str] = ()
) -> list[Block]:
    """A block for every layer of the model that owns parameters, in the order of `model.named_modules()`.

    Args:
        model: The network.
        trained: Parameters that the optimizer was given; others get no block.
        form: Form of the BatchNorm Fisher.
        skip: Shell-style patterns of names of modules that are to get the plain gradient.

    Returns:
        Blocks; each trained parameter of the model is in exactly one.

    Raises:
        InputError: If a pattern matches no module, or a lazy module does not know its shapes yet.
    """
    _refuse_lazy(model)
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
            if id(parameter) in wanted and id(parameter) not in claimed and parameter.requires_grad
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
    block_type = BLOCK_TYPES.get(type(module))
    if any(fnmatchcase(name, pattern) for pattern in skip):
        reason = "skipped by pattern"
    elif is_parametrized(module):
        reason = computed_from_others(next(iter(module.get_submodule("parametrizations")._modules)))
    elif block_type is None:
        reason = f"{type(module).__name__} has no K-FAC form here"
    elif tied:
        reason = "a parameter is shared with another layer"
    elif "forward" in vars(module):
        reason = "its forward was replaced"
    else:
        reason = block_type.why_not(module, own)
    if reason or block_type is None:
        return IdentityBlock(name, module, own, reason)
    return block_type.create(name, module, own, form)


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in _direct_parameters(module)):
            raise InputError(
                f"{name or '(root)'}, a {type(module).__name__}, does not know its shapes yet: run one forward of the "
                "model before making the optimizer"
            )


def _count_owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter (by id) directly."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in _direct_parameters(module):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _direct_parameters(module: nn.Module) -> Iterator[Parameter]:
    return (parameter for parameter in module._parameters.values() if parameter is not None)

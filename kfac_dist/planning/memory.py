"""Memory of the Fisher, known before training from the shapes alone (Figure 4 and beyond)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import block_cost, create_blocks
from kfac_dist.curvature.patches import UNFOLD_NUMEL
from kfac_dist.models import create_model
from kfac_dist.tensors.packing import triangle_numel
from kfac_dist.vocabulary import BatchNormForm

_BYTES = 4  # factors, inverses and buffers are kept in fp32
_FORMS: tuple[BatchNormForm, ...] = get_args(BatchNormForm)


@dataclass(frozen=True)
class FisherMemory:
    """Bytes of a model's Fisher matrices, fp32.

    Attributes:
        kronecker: A and G, every value of the symmetric matrices.
        kronecker_packed: A and G, upper triangles.
        batchnorm: F of BatchNorm by form, every value.
        batchnorm_packed: F of BatchNorm by form, upper triangles.
    """

    kronecker: int
    kronecker_packed: int
    batchnorm: dict[BatchNormForm, int]
    batchnorm_packed: dict[BatchNormForm, int]


def fisher_memory(model: nn.Module) -> FisherMemory:
    """Sizes of the matrices themselves, without inverses, as Figure 4 counts them."""
    blocks = {form: create_blocks(model, list(model.parameters()), form) for form in _FORMS}
    kronecker = [block for block in blocks["full"] if block.form == "kronecker"]
    batchnorm = {form: [block for block in of_form if block.form == form] for form, of_form in blocks.items()}
    return FisherMemory(
        kronecker=_matrix_bytes(kronecker, packed=False),
        kronecker_packed=_matrix_bytes(kronecker, packed=True),
        batchnorm={form: _matrix_bytes(of_form, packed=False) for form, of_form in batchnorm.items()},
        batchnorm_packed={form: _matrix_bytes(of_form, packed=True) for form, of_form in batchnorm.items()},
    )


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the ranks of a job, fp32.

    Attributes:
        buffers: Flat buffers of stages 3 and 6, on every rank.
        largest_running: Running Fisher of the rank that owns the most.
        largest_solvers: Cholesky factors or inverses of the rank that owns the most.
        largest_tables: Index tables for packing every size, and for unpacking those that the rank owns.
    """

    buffers: int
    largest_running: int
    largest_solvers: int
    largest_tables: int


def rank_memory(model: nn.Module, form: BatchNormForm, num_ranks: int, skip: Sequence[str] = ()) -> RankMemory:
    """What the ranks hold when the model's layers, but those skipped, are shared out over `num_ranks`."""
    blocks = create_blocks(model, list(model.parameters()), form, skip)
    owners = assign_owners([block_cost(block) for block in blocks], num_ranks)
    owned = [0] * num_ranks
    owned_sizes: list[set[int]] = [set() for _ in range(num_ranks)]
    buffers = 0
    for block, ranks in zip(blocks, owners, strict=True):
        buffers += len(ranks) * (_matrix_bytes([block], packed=True) + _BYTES * block.num_values)
        buffers += _BYTES * block.num_values  # stage 6
        for rank in ranks:
            owned[rank] += _matrix_bytes([block], packed=False)
            owned_sizes[rank] |= {size for _, size in block.factor_shapes.values()}
    packing = 4 * sum(triangle_numel(size) for size in set().union(*owned_sizes) if size > 1)  # int32
    unpacking = max(4 * sum(size * size for size in sizes if size > 1) for sizes in owned_sizes)
    return RankMemory(buffers, max(owned), max(owned), packing + unpacking)


def largest_unfolding(model: nn.Module, image_shape: tuple[int, int, int], batch: int) -> tuple[int, int]:
    """Bytes of the largest convolution's im2col matrix for a micro-batch, and of what is really unfolded at once.

    Returns:
        (im2col, unfolded): one value for each kernel position, and the horizontal unfolding in chunks.
    """
    largest = [0, 0]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        x = inputs[0]
        vertical, horizontal = module.kernel_size
        im2col = output[:, 0].numel() * x.shape[1] * vertical * horizontal
        rows = x.numel() * horizontal // module.stride[1]
        if vertical * horizontal > 1:
            largest[0] = max(largest[0], im2col * _BYTES)
            largest[1] = max(largest[1], min(rows, max(UNFOLD_NUMEL, rows // batch)) * _BYTES)

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(hook) for module in convolutions]
    with torch.no_grad():
        model.to("meta").train()(torch.empty(batch, *image_shape, device="meta"))
    for handle in handles:
        handle.remove()
    return largest[0], largest[1]


def report(name: str, image_shape: tuple[int, int, int], num_classes: int, batch: int, ranks: Sequence[int]) -> str:
    """All of the above as text.

    Raises:
        InputError: If there is no such model or it does not take such images.
    """
    model = create_model(name, num_classes, image_shape, seed=0)
    memory = fisher_memory(model)
    channels, height, width = image_shape
    lines = [
        f"{name} for {channels}x{height}x{width} images and {num_classes} classes, fp32, MiB",
        "",
        "Fisher matrices (Figure 4: no inverses)     whole    packed",
    ]
    for form in _FORMS:
        whole = memory.kronecker + memory.batchnorm[form]
        packed = memory.kronecker_packed + memory.batchnorm_packed[form]
        lines.append(f"  A and G, BatchNorm {form:<10}         {_mib(whole)}  {_mib(packed)}")
    lines += [
        "",
        "a rank, BatchNorm diagonal     buffers   running   solvers    tables     total",
    ]
    for num_ranks in ranks:
        of_rank = rank_memory(model, "diagonal", num_ranks)
        cells = [of_rank.buffers, of_rank.largest_running, of_rank.largest_solvers, of_rank.largest_tables]
        lines.append(f"  {num_ranks:>5} ranks              " + "  ".join(_mib(cell) for cell in [*cells, sum(cells)]))
    lines += [
        "  buffers: what is sent in stages 3 and 6, the same on every rank; the others: of the rank that owns the most",
        "  running: the running Fisher matrices that a rank owns",
        "  solvers: their Cholesky factors or inverses, as large again",
        "  tables: where each value of a triangle lies in its matrix, kept to pack and unpack quickly",
    ]
    im2col, unfolded = largest_unfolding(model, image_shape, batch)
    lines += ["", f"largest convolution at batch {batch}: im2col {_mib(im2col)}, unfolded at once {_mib(unfolded)}"]
    return "\n".join(lines)


def _matrix_bytes(blocks: Sequence[Block], packed: bool) -> int:
    sizes = [(count, size) for block in blocks for count, size in block.factor_shapes.values()]
    return _BYTES * sum(count * (triangle_numel(size) if packed else size * size) for count, size in sizes)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:8.1f}"

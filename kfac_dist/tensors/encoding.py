"""Half-precision forms in which values may travel. Pure tensor code: nothing here communicates or waits for a GPU.

    bfloat16    a plain cast: float32's range, 8 significant bits, relative error at most 2⁻⁸
    float16     block-scaled: 11 significant bits, relative error at most 2⁻¹¹ for every value that is not
                smaller than 2⁻²⁸ of the largest in its block

Fisher factors span more than float16 does (10⁻¹² … 10⁴), so float16 goes in blocks of up to 1024 values, each with a
scale of its own: a power of two, so that scaling is exact, that brings the block's largest magnitude to 2¹⁴ … 2¹⁵.
A segment consists of parts (matrices, gradients), and no block holds values of two of them: beside an input factor
of 10² an output factor of 10⁻⁷ would arrive as zeros. Encoded, a segment is its scales (float32, one a block), then its
halves, filled up to a multiple of 4 bytes.

Inf and nan arrive as such; the other values of such a block are lost. Magnitudes that float32 does not hold, its
largest ones rounded up included, arrive as inf or 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.tensors.foreach import copy_all_

BLOCK = 1024
"""Values that share a scale, at most."""

_SCALE_BYTES = 4
_LARGEST_EXPONENT = 15
# Of the block's largest value, as float32's frexp gives it: in this range the scale and its inverse are normal numbers.
_EXPONENTS = (-111, 128)


def check_comm_dtype(comm_dtype: torch.dtype) -> None:
    """Refuse a dtype that has no form here.

    Raises:
        ValueError: If it is neither bfloat16 nor float16.
    """
    if comm_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"comm_dtype must be torch.bfloat16, torch.float16 or None, got {comm_dtype}")


def encoded_bytes(part_numels: Sequence[int], comm_dtype: torch.dtype) -> int:
    """Bytes of an encoded segment.

    Args:
        part_numels: Values in each of its parts.
        comm_dtype: bfloat16 or float16.
    """
    check_comm_dtype(comm_dtype)
    count = sum(part_numels)
    if comm_dtype == torch.bfloat16:
        return 2 * count
    return _SCALE_BYTES * _num_blocks(part_numels) + 2 * (count + count % 2)


def encode(values: Tensor, part_numels: Sequence[int], comm_dtype: torch.dtype, out: Tensor) -> None:
    """Write the values' encoded form, each value rounded once.

    Args:
        values: (Σ part_numels,), floating point.
        part_numels: Values in each part, all of which lie one behind the other.
        comm_dtype: bfloat16 or float16.
        out: (encoded_bytes(part_numels, comm_dtype),), uint8, contiguous, at a multiple of 4 bytes from its storage's
            beginning (of 2 for bfloat16); overwritten.
    """
    check_comm_dtype(comm_dtype)
    if not values.numel():
        return
    if comm_dtype == torch.bfloat16:
        out.view(torch.bfloat16).copy_(values)
        return
    scales, halves = _scales_and_halves(out, part_numels)
    blocks = values.new_zeros(len(scales) * BLOCK, dtype=_at_least_float32(values.dtype))
    copy_all_(_parts_in_blocks(blocks, part_numels), values.split(list(part_numels)))
    blocks = blocks.view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1).float()
    exponents = torch.where(largest.isfinite(), torch.frexp(largest).exponent, _EXPONENTS[1]).clamp(*_EXPONENTS)
    scales.copy_(_power_of_two(exponents - _LARGEST_EXPONENT))
    blocks *= _power_of_two(_LARGEST_EXPONENT - exponents)[:, None].to(blocks.dtype)
    rounded = blocks.view(-1).half()
    copy_all_(halves[: len(values)].split(list(part_numels)), _parts_in_blocks(rounded, part_numels))
    halves[len(values) :].zero_()


def decode(encoded: Tensor, part_numels: Sequence[int], comm_dtype: torch.dtype, out: Tensor) -> None:
    """Read values back.

    Args:
        encoded: As `encode` wrote it, laid out as its `out`.
        part_numels: As given to `encode`.
        comm_dtype: bfloat16 or float16.
        out: (Σ part_numels,), floating point; overwritten.
    """
    check_comm_dtype(comm_dtype)
    if not out.numel():
        return
    if comm_dtype == torch.bfloat16:
        out.copy_(encoded.view(torch.bfloat16))
        return
    scales, halves = _scales_and_halves(encoded, part_numels)
    rounded = halves.new_zeros(len(scales) * BLOCK)
    copy_all_(_parts_in_blocks(rounded, part_numels), halves[: len(out)].split(list(part_numels)))
    blocks = rounded.to(_at_least_float32(out.dtype)).view(-1, BLOCK).mul_(scales[:, None])
    copy_all_(out.split(list(part_numels)), _parts_in_blocks(blocks.view(-1), part_numels))


def _scales_and_halves(encoded: Tensor, part_numels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Views of the scales and of the halves, the filling included."""
    scale_bytes = _SCALE_BYTES * _num_blocks(part_numels)
    return encoded[:scale_bytes].view(torch.float32), encoded[scale_bytes:].view(torch.float16)


def _parts_in_blocks(blocks: Tensor, part_numels: Sequence[int]) -> list[Tensor]:
    """Views of each part's values in (num_blocks · BLOCK,): a part begins with a block, and its last one has a rest."""
    views, begin = [], 0
    for numel in part_numels:
        views.append(blocks[begin : begin + numel])
        begin += BLOCK * _num_blocks([numel])
    return views


def _power_of_two(exponents: Tensor) -> Tensor:
    """2 to the exponents (int32, −126 … 127) as float32, exact on every device, which `pow` need not be."""
    return ((exponents + 127) << 23).view(torch.float32)


def _num_blocks(part_numels: Sequence[int]) -> int:
    return sum(-(-numel // BLOCK) for numel in part_numels)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32

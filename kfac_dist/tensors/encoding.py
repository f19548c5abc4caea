"""Half-precision forms in which values may travel. Pure tensor code: nothing here communicates or waits for a GPU.

    bfloat16    a plain cast: float32's range, 8 significant bits, relative error at most 2⁻⁸
    float16     block-scaled: 11 significant bits, relative error at most 2⁻¹¹ for every value that is not
                smaller than 2⁻²⁸ of the largest in its block

Fisher factors span more than float16 does (10⁻¹² … 10⁴), so float16 goes in blocks of 1024 values, each with a scale
of its own: a power of two, so that scaling is exact, that brings the block's largest magnitude to 2¹⁴ … 2¹⁵. A segment
is its scales (float32, one a block), then its halves, filled up to a multiple of 4 bytes.

Inf and nan arrive as such; the other values of such a block are lost. Magnitudes that float32 does not hold, its
largest ones rounded up included, arrive as inf or 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024
"""Values that share a scale."""

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


def encoded_bytes(count: int, comm_dtype: torch.dtype) -> int:
    """Bytes of `count` encoded values."""
    check_comm_dtype(comm_dtype)
    if comm_dtype == torch.bfloat16:
        return 2 * count
    return _SCALE_BYTES * _num_blocks(count) + 2 * _even(count)


def encode(values: Tensor, comm_dtype: torch.dtype, out: Tensor) -> None:
    """Write the values' encoded form, each value rounded once.

    Args:
        values: (count,), floating point.
        comm_dtype: bfloat16 or float16.
        out: (encoded_bytes(count),), uint8, contiguous, at a multiple of 4 bytes from its storage's beginning
            (of 2 for bfloat16); overwritten.
    """
    check_comm_dtype(comm_dtype)
    if not values.numel():
        return
    if comm_dtype == torch.bfloat16:
        out.view(torch.bfloat16).copy_(values)
        return
    scales, halves = _parts(out, len(values))
    blocks = F.pad(_at_least_float32(values), (0, BLOCK * len(scales) - len(values))).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1).float()
    exponents = torch.where(largest.isfinite(), torch.frexp(largest).exponent, _EXPONENTS[1]).clamp(*_EXPONENTS)
    scales.copy_(_power_of_two(exponents - _LARGEST_EXPONENT))
    blocks = blocks * _power_of_two(_LARGEST_EXPONENT - exponents)[:, None].to(blocks.dtype)
    halves.copy_(blocks.view(-1)[: len(halves)])


def decode(encoded: Tensor, comm_dtype: torch.dtype, out: Tensor) -> None:
    """Read values back.

    Args:
        encoded: As `encode` wrote it, laid out as its `out`.
        comm_dtype: bfloat16 or float16.
        out: (count,), floating point; overwritten.
    """
    check_comm_dtype(comm_dtype)
    if not out.numel():
        return
    if comm_dtype == torch.bfloat16:
        out.copy_(encoded.view(torch.bfloat16))
        return
    scales, halves = _parts(encoded, len(out))
    values = halves.to(_at_least_float32(out).dtype)
    whole = len(out) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    values[whole:].mul_(scales[-1])
    out.copy_(values[: len(out)])


def _parts(encoded: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Views of the scales and of the halves, the filling included."""
    scale_bytes = _SCALE_BYTES * _num_blocks(count)
    return encoded[:scale_bytes].view(torch.float32), encoded[scale_bytes:].view(torch.float16)


def _power_of_two(exponents: Tensor) -> Tensor:
    """2 to the exponents (int32, −126 … 127) as float32, exact on every device, which `pow` need not be."""
    return ((exponents + 127) << 23).view(torch.float32)


def _num_blocks(count: int) -> int:
    return -(-count // BLOCK)


def _even(count: int) -> int:
    return count + count % 2


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()

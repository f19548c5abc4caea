"""Kronecker factors of Linear and Conv2d layers (CVPR 2019, section 3; Grosse & Martens 2016).

    A   input factor, (1/N) Σ_n Σ_t a aᵀ over N samples and T output positions; a ends in 1 where there is a bias
    G   output factor, (1/(N·T)) Σ_n Σ_t (N g)(N g)ᵀ; g is the gradient of the *mean* loss, so N g is a sample's own
    d   input or output features; k groups give k independent blocks

All functions return a stack of symmetric matrices (k, n, n), k = 1 unless the convolution is grouped. Half-precision
arguments are multiplied as they are, on Tensor Cores, but summed and returned in fp32: a sum over 400,000 rows would
neither fit fp16 (65,504 at most) nor keep its digits.
"""

from collections import defaultdict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest unfolded input (values) that is held at once; a longer batch is cut into chunks.
UNFOLD_NUMEL = 16 << 20

Pair = tuple[int, int]
Padding = Pair | Literal["same", "valid"]


def linear_input_factor(x: Tensor, bias: bool) -> Tensor:
    """A of a Linear layer.

    Args:
        x: Layer input, (N, *, d_in); dimensions between the first and the last are positions.
        bias: Whether the layer has a bias; a ones column is then appended.

    Returns:
        (1, n, n) with n = d_in, + 1 with a bias.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _second_moment(rows[None], bias).div_(x.shape[0])


def linear_output_factor(g: Tensor) -> Tensor:
    """G of a Linear layer.

    Args:
        g: Gradient of the mean loss at the layer's output, (N, *, d_out).

    Returns:
        (1, d_out, d_out).
    """
    rows = g.reshape(-1, g.shape[-1])
    positions = rows.shape[0] / g.shape[0]
    return _second_moment(rows[None]).mul_(g.shape[0] / positions)


def conv2d_output_factor(g: Tensor, groups: int) -> Tensor:
    """G of a Conv2d layer, a block for each group.

    Args:
        g: Gradient of the mean loss at the layer's output, (N, d_out, H, W).
        groups: Groups of the convolution.

    Returns:
        (groups, d_out/groups, d_out/groups).
    """
    num_samples, _, height, width = g.shape
    return _second_moment(_rows_by_group(g, groups)).mul_(num_samples / (height * width))


def conv2d_input_factor(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    bias: bool,
    padding_mode: str = "zeros",
) -> Tensor:
    """A of a Conv2d layer, a block for each group; the patch's order is that of the flattened weight.

    Args:
        x: Layer input, (N, C, H, W).
        kernel_size: As the layer has it, (vertical, horizontal), and so the other pairs.
        stride: Likewise.
        padding: (vertical, horizontal), or "same" or "valid".
        dilation: Likewise.
        groups: Groups of the convolution.
        bias: Whether the layer has a bias; a ones entry is then appended to the patch.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (groups, n, n) with n = C/groups · kernel height · kernel width, + 1 with a bias.
    """
    x = _pad(x, kernel_size, padding, dilation, padding_mode)
    if kernel_size == (1, 1):
        rows = _rows_by_group(x[:, :, :: stride[0], :: stride[1]], groups)
        return _second_moment(rows, bias).div_(x.shape[0])
    samples_at_once = max(1, UNFOLD_NUMEL // (x[0].numel() * kernel_size[1]))
    chunks = [
        _patch_second_moment(chunk, kernel_size, stride, dilation, groups, bias) for chunk in x.split(samples_at_once)
    ]
    factor = chunks[0]
    for chunk_factor in chunks[1:]:
        factor += chunk_factor
    return factor.div_(x.shape[0])


def _rows_by_group(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) → (groups, N·H·W, C/groups); a view of a channels-last tensor with one group."""
    num_samples, channels, height, width = x.shape
    split = x.permute(0, 2, 3, 1).reshape(num_samples * height * width, groups, channels // groups)
    return split.transpose(0, 1)


def _pad(x: Tensor, kernel_size: Pair, padding: Padding, dilation: Pair, padding_mode: str) -> Tensor:
    """Apply the layer's padding, so that what follows sees an unpadded convolution."""
    if padding == "valid":
        return x
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        top, left = total[0] // 2, total[1] // 2  # the odd one goes to the bottom and the right, as in torch
        amounts = [left, total[1] - left, top, total[0] - top]
    else:
        assert not isinstance(padding, str)
        amounts = [padding[1], padding[1], padding[0], padding[0]]
    if not any(amounts):
        return x
    return F.pad(x, amounts, mode="constant" if padding_mode == "zeros" else padding_mode)


def _patch_second_moment(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair, groups: int, bias: bool) -> Tensor:
    """Σ over samples and positions of patch · patchᵀ, for an already padded input (N, C, H, W).

    The input is unfolded horizontally only. Block (δ₁, δ₂) of the result, one for each pair of kernel rows, sums
    products of image rows that lie a fixed lag apart; pairs with the same lag sum over the same rows but for a few
    at the top and the bottom. So a lag's common rows are multiplied once: a 3×3 kernel needs 3 large products
    where an unfolded input needs the equal of 9, and a third of the memory. Exact, not an approximation.
    """
    (kernel_height, kernel_width), channels = kernel_size, x.shape[1] // groups
    out_height = (x.shape[2] - dilation[0] * (kernel_height - 1) - 1) // stride[0] + 1
    rows = _unfold_horizontally(x, kernel_width, stride[1], dilation[1], groups)
    # Kernel row δ meets image rows δ·dilation + i·stride: rows of one residue class, from one offset on.
    classes = [rows[:, residue :: stride[0]].contiguous() for residue in range(min(stride[0], x.shape[2]))]
    places = [divmod(row * dilation[0], stride[0]) for row in range(kernel_height)]

    width = rows.shape[-1]
    moment = x.new_empty(groups, kernel_height, width, kernel_height, width, dtype=_sum_dtype(x))
    for pairs in _pairs_by_lag(places).values():
        starts = [places[upper][0] for upper, _ in pairs]
        common_begin, common_end = max(starts), min(starts) + out_height
        common: Tensor | None = None
        for upper, lower in pairs:
            (offset, residue), (lower_offset, lower_residue) = places[upper], places[lower]
            lag = lower_offset - offset

            def product(
                begin: int, end: int, first: int = residue, second: int = lower_residue, lag: int = lag
            ) -> Tensor:
                return _cross_moment(classes[first][:, begin:end], classes[second][:, begin + lag : end + lag])

            if common_begin >= common_end:
                block = product(offset, offset + out_height)
            else:
                if common is None:
                    common = product(common_begin, common_end)
                block = common
                if offset < common_begin:
                    block = block + product(offset, common_begin)
                if common_end < offset + out_height:
                    block = block + product(common_end, offset + out_height)
            moment[:, upper, :, lower] = block
            moment[:, lower, :, upper] = block.mT
    size = kernel_height * width
    order = (0, 3, 1, 2, 6, 4, 5)  # (kernel row, kernel column, channel) → the weight's (channel, row, column)
    parts = (groups, kernel_height, kernel_width, channels)
    moment = moment.view(*parts, *parts[1:]).permute(order).reshape(groups, size, size)
    if not bias:
        return moment
    sums = torch.stack(
        [
            classes[residue][:, offset : offset + out_height].sum(dim=(1, 2), dtype=moment.dtype)
            for offset, residue in places
        ],
        dim=1,
    )
    patch_sum = sums.view(parts).permute(0, 3, 1, 2).reshape(groups, size)
    return _append_ones(moment, patch_sum, out_height * rows.shape[2])


def _unfold_horizontally(x: Tensor, kernel_width: int, stride: int, dilation: int, groups: int) -> Tensor:
    """(N, C, H, W) → (groups, H, N·W_out, kernel_width·C/groups): for each image row its horizontal patches."""
    num_samples, channels, height, width = x.shape
    out_width = (width - dilation * (kernel_width - 1) - 1) // stride + 1
    rows = x.reshape(num_samples, groups, channels // groups, height, width).permute(1, 3, 0, 4, 2).contiguous()
    size, samples, row, column, _ = rows.stride()
    patches = rows.as_strided(
        (groups, height, num_samples, out_width, kernel_width, channels // groups),
        (size, samples, row, stride * column, dilation * column, 1),
    )
    return patches.reshape(groups, height, num_samples * out_width, kernel_width * channels // groups)


def _pairs_by_lag(places: list[Pair]) -> dict[tuple[int, int, int], list[Pair]]:
    """Group the pairs of kernel rows (δ₁ ≤ δ₂) whose image rows lie in the same classes and the same lag apart."""
    pairs: dict[tuple[int, int, int], list[Pair]] = defaultdict(list)
    for upper, (upper_offset, upper_residue) in enumerate(places):
        for lower, (lower_offset, lower_residue) in enumerate(places[upper:], start=upper):
            pairs[upper_residue, lower_residue, lower_offset - upper_offset].append((upper, lower))
    return pairs


def _second_moment(rows: Tensor, bias: bool = False) -> Tensor:
    """Σ row · rowᵀ of (k, R, n), with a ones column appended first where there is a bias."""
    moment = _cross_moment(rows, rows)
    return _append_ones(moment, rows.sum(dim=1, dtype=moment.dtype), rows.shape[1]) if bias else moment


def _cross_moment(first: Tensor, second: Tensor) -> Tensor:
    """Σ over all but the outer dimensions of first · secondᵀ: (k, *, m) and (k, *, n) → (k, m, n)."""
    first, second = first.flatten(1, -2), second.flatten(1, -2)
    if first.dtype != _sum_dtype(first):
        if first.device.type != "cpu":
            if first.shape[0] == 1:
                return torch.mm(first[0].T, second[0], out_dtype=torch.float32)[None]
            return torch.bmm(first.mT, second, out_dtype=torch.float32)
        first, second = first.float(), second.float()  # the CPU has no such product; this one is the same to rounding
    if first.shape[0] == 1:  # a plain product is faster than a batch of one
        return torch.mm(first[0].T, second[0])[None]
    return torch.bmm(first.mT, second)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums over rows of x."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _append_ones(moment: Tensor, row_sum: Tensor, num_rows: int) -> Tensor:
    """Second moment of rows with a trailing 1, from that of the rows without."""
    size = moment.shape[-1]
    extended = moment.new_empty(moment.shape[0], size + 1, size + 1)
    extended[:, :size, :size] = moment
    extended[:, :size, size] = row_sum
    extended[:, size, :size] = row_sum
    extended[:, size, size] = num_rows
    return extended

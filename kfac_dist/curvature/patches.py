"""Σ a aᵀ over all patches a of a convolution's input, without unfolding it into them.

The input is unfolded horizontally only, which leaves products of its rows to be summed. Block (δ₁, δ₂) of the sum, one
for each pair of kernel rows, takes rows that lie a fixed lag apart; pairs with the same lag take the same rows but for
a few at the top and the bottom. So a lag's common rows are multiplied once: a 3×3 kernel needs 3 large products where
an unfolded input needs the equal of 9, and a third of the memory. Exact, not an approximation.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.curvature.chunks import cut, sample_chunks, sum_over
from kfac_dist.curvature.factors import append_ones, cross_moment, pixel_rows, second_moment, sum_dtype

# Largest unfolded input (values) that is held at once; a longer batch is cut into chunks.
UNFOLD_NUMEL = 16 << 20

Pair = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """Where a convolution takes its patches from.

    Attributes:
        kernel_size: Of a patch, (vertical, horizontal), and so the other pairs.
        stride: Between patches.
        dilation: Between the values of a patch.
        padding: What is added to an image on the left, the right, the top and the bottom.
        padding_mode: What with: "zeros", "reflect", "replicate" or "circular".
        groups: Groups that the channels fall into.
    """

    kernel_size: Pair
    stride: Pair
    dilation: Pair
    padding: tuple[int, int, int, int]
    padding_mode: str
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "Patches":
        """Those of a layer."""
        kernel_size, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        if layer.padding == "same":
            top, left = (d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True))
            bottom, right = (d * (k - 1) - d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True))
        else:
            top, left = bottom, right = (0, 0) if isinstance(layer.padding, str) else _pair(layer.padding)
        return cls(
            kernel_size, _pair(layer.stride), dilation, (left, right, top, bottom), layer.padding_mode, layer.groups
        )

    def out_size(self, size: int, axis: int) -> int:
        """Patches that fit into `size` rows (axis 0) or columns (axis 1) of a padded image."""
        return (size - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1) // self.stride[axis] + 1

    def pad(self, x: Tensor) -> Tensor:
        """Apply the layer's padding to images (N, C, H, W)."""
        if not any(self.padding):
            return x
        return F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)


def patch_moment(x: Tensor, patches: Patches, ones: bool) -> Tensor:
    """Σ a aᵀ over all patches; a's order is that of the layer's flattened weight.

    Args:
        x: Layer input, (N, C, H, W).
        patches: Where they lie.
        ones: Whether each is to end in a further 1, the input of a bias.

    Returns:
        (groups, n, n) with n = C/groups · kernel height · kernel width, one larger with ones.
    """
    (_, channels, height, width), (left, right, top, bottom) = x.shape, patches.padding
    padded = channels * (height + top + bottom) * (width + left + right)
    at_once = UNFOLD_NUMEL * x[0].numel() // (padded * patches.kernel_size[1])
    size = channels // patches.groups * patches.kernel_size[0] * patches.kernel_size[1]
    chunks = [part for chunk in sample_chunks(x, sum_numel=patches.groups * size**2) for part in cut(chunk, at_once)]
    return sum_over(chunks, partial(_moment_of_chunk, patches=patches, ones=ones))


def _moment_of_chunk(x: Tensor, patches: Patches, ones: bool) -> Tensor:
    """`patch_moment` of a few samples."""
    if x.device.type == "cpu":
        x = x.to(sum_dtype(x))  # once: every product of `cross_moment` would convert what it takes again
    x = patches.pad(x)
    if patches.kernel_size == (1, 1):
        vertical, horizontal = patches.stride
        return second_moment(pixel_rows(x[:, :, ::vertical, ::horizontal], patches.groups), ones)
    (kernel_height, kernel_width), groups, stride = patches.kernel_size, patches.groups, patches.stride[0]
    rows = _unfold_horizontally(x, patches)
    out_height, width = patches.out_size(x.shape[2], axis=0), rows.shape[-1]
    # Kernel row δ meets image rows δ·dilation + i·stride: rows of one residue class, from one offset on.
    classes = [rows[:, residue::stride].contiguous() for residue in range(min(stride, x.shape[2]))]
    starts = [divmod(row * patches.dilation[0], stride) for row in range(kernel_height)]

    moment = x.new_empty(groups, kernel_height, width, kernel_height, width, dtype=sum_dtype(x))
    for upper, lower, block in _kernel_row_blocks(classes, starts, out_height):
        moment[:, upper, :, lower] = block
        if lower != upper:
            moment[:, lower, :, upper] = block.mT
    size = kernel_height * width
    order = (0, 3, 1, 2, 6, 4, 5)  # (kernel row, kernel column, channel) → the weight's (channel, row, column)
    parts = (groups, kernel_height, kernel_width, x.shape[1] // groups)
    moment = moment.view(*parts, *parts[1:]).permute(order).reshape(groups, size, size)
    if not ones:
        return moment
    sums = torch.stack(
        [
            classes[residue][:, offset : offset + out_height].sum(dim=(1, 2), dtype=moment.dtype)
            for offset, residue in starts
        ],
        dim=1,
    )
    patch_sum = sums.view(parts).permute(0, 3, 1, 2).reshape(groups, size)
    return append_ones(moment, patch_sum, out_height * rows.shape[2])


def _unfold_horizontally(x: Tensor, patches: Patches) -> Tensor:
    """(N, C, H, W) → (groups, H, N·W_out, kernel width · C/groups): for each image row its horizontal patches."""
    num_samples, channels, height, width = x.shape
    groups, kernel_width, out_width = patches.groups, patches.kernel_size[1], patches.out_size(width, axis=1)
    rows = x.reshape(num_samples, groups, channels // groups, height, width).permute(1, 3, 0, 4, 2).contiguous()
    group, row, sample, column, _ = rows.stride()
    unfolded = rows.as_strided(
        (groups, height, num_samples, out_width, kernel_width, channels // groups),
        (group, row, sample, patches.stride[1] * column, patches.dilation[1] * column, 1),
    )
    return unfolded.reshape(groups, height, num_samples * out_width, kernel_width * channels // groups)


def _kernel_row_blocks(
    classes: Sequence[Tensor], starts: Sequence[Pair], out_height: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks (δ₁, δ₂), δ₁ ≤ δ₂, of Σ a aᵀ.

    Args:
        classes: For each residue the unfolded image rows of its class, (groups, rows, N·W_out, n).
        starts: For each kernel row its class, and where in it the first of its rows stands: (offset, residue).
        out_height: Rows of the output, and so of each kernel row.

    Yields:
        δ₁, δ₂ and the block, (groups, n, n).
    """
    for (upper_residue, lower_residue, lag), pairs in _pairs_by_lag(starts).items():
        product = partial(_lagged_moment, classes[upper_residue], classes[lower_residue], lag)
        offsets = [starts[upper][0] for upper, _ in pairs]
        begin, end = max(offsets), min(offsets) + out_height
        common = product(begin, end) if begin < end else None
        for (upper, lower), offset in zip(pairs, offsets, strict=True):
            if common is None:
                yield upper, lower, product(offset, offset + out_height)
                continue
            block = common
            if offset < begin:
                block = block + product(offset, begin)
            if end < offset + out_height:
                block = block + product(end, offset + out_height)
            yield upper, lower, block


def _pairs_by_lag(starts: Sequence[Pair]) -> dict[tuple[int, int, int], list[Pair]]:
    """Group the pairs of kernel rows (δ₁ ≤ δ₂) whose image rows lie in the same classes and the same lag apart."""
    pairs: dict[tuple[int, int, int], list[Pair]] = defaultdict(list)
    for upper, (upper_offset, upper_residue) in enumerate(starts):
        for lower, (lower_offset, lower_residue) in enumerate(starts[upper:], start=upper):
            pairs[upper_residue, lower_residue, lower_offset - upper_offset].append((upper, lower))
    return pairs


def _lagged_moment(upper: Tensor, lower: Tensor, lag: int, begin: int, end: int) -> Tensor:
    """Σ of upper[i] · lower[i + lag]ᵀ over image rows i from begin to end."""
    return cross_moment(upper[:, begin:end], lower[:, begin + lag : end + lag])


def _pair(value: Sequence[int]) -> Pair:
    vertical, horizontal = value
    return vertical, horizontal

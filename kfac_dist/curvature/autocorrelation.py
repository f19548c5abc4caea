"""Σ a aᵀ over the patches of a 3×3 convolution from the image's autocorrelation.

A block of the sum, one for each pair of places in the kernel, takes the products of pixels that lie a fixed shift
apart. Pairs with the same shift take the same pixels, but for those at the image's border that the patch of an output
pixel cannot have there. So 13 products of C columns, one for each shift up to sign, replace the 45 of an unfolded
input, nothing is unfolded, and what the border excludes is taken off again: the first or last row, column and corner.

All shifts are the weight gradient of one convolution, whose input and output gradient are both the image: libraries
have no faster way through an image. This holds for stride 1 and zeros around the image, one deep; all else is left to
`kfac_dist.curvature.patches`, which is also what this is tested against. Exact, not an approximation.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from kfac_dist.curvature.chunks import sample_chunks, sum_over
from kfac_dist.curvature.factors import cross_moment, sum_dtype
from kfac_dist.curvature.patches import Patches

_FARTHEST = 2  # the largest shift of a row or column
_PLACES = [divmod(place, 3) for place in range(9)]  # (row, column) in the kernel


class _Block(NamedTuple):
    """What distinguishes a block of the sum: the shift, and what of the image the upper place of the pair cannot meet.

    The kernel's first row never meets the image's last one, nor its last row the image's first. Where rows are shifted
    a pair loses no more by that, as those products would reach beyond the image. Columns are alike.

    Attributes:
        rows: Shift in rows, ≥ 0.
        columns: Shift in columns, ≥ 0 where no row is shifted.
        row: 0 lacks the last image row, 2 the first, 1 none.
        column: Likewise for columns.
    """

    rows: int
    columns: int
    row: int = 1
    column: int = 1

    @classmethod
    def of(cls, upper: int, lower: int) -> "_Block":
        """The block of two places, upper ≤ lower."""
        (row, column), (lower_row, lower_column) = _PLACES[upper], _PLACES[lower]
        rows, columns = lower_row - row, lower_column - column
        return cls(rows, columns, row if rows == 0 else 1, column if columns == 0 else 1)


_PAIRS = {(upper, lower): _Block.of(upper, lower) for upper in range(9) for lower in range(upper, 9)}
_SHIFTS = [_Block(0, 0), _Block(0, 1), _Block(0, 2)] + [_Block(r, c) for r in (1, 2) for c in range(-2, 3)]
_BLOCKS = _SHIFTS + sorted(set(_PAIRS.values()) - set(_SHIFTS))  # 13 and 16


def pays(x: Tensor, patches: Patches) -> bool:
    """Whether the sum can be had this way, and sooner.

    Measured on a CPU, with 1 to 512 channels and 2×2 to 224×224 pixels: up to five times as fast, and never slower than
    by 0.15 ms. On a GPU nothing was measured yet. Without oneDNN, which knows no fp64, a convolution's weight gradient
    is made of unfolded images and takes two to three times as long as the plain way.

    Args:
        x: Layer input, (N, C, H, W).
        patches: Where the patches lie.
    """
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and patches.kernel_size == (3, 3)
        and patches.stride == patches.dilation == (1, 1)
        and patches.padding == (1, 1, 1, 1)
        and patches.padding_mode == "zeros"
        and patches.groups == 1
    )


def pack_patch_moment(x: Tensor, ones: bool, scale: float, out: Tensor) -> None:
    """Write the upper triangle of scale · Σ a aᵀ into a flat buffer; a's order is that of the layer's flattened weight.

    Args:
        x: Layer input, (N, C, H, W).
        ones: Whether each patch is to end in a further 1, the input of a bias.
        scale: Factor.
        out: (n(n+1)/2,) with n = 9 C, one larger with ones; overwritten.
    """
    chunks = sample_chunks(x, sum_numel=len(_BLOCKS) * x.shape[1] ** 2)
    raw = sum_over(chunks, partial(_raw_sums, ones=ones))
    values = _distinct_values(raw, x.shape[1], x.numel() // x.shape[1], ones).mul_(scale).to(out.dtype)
    torch.index_select(values, 0, _triangle_index(x.shape[1], ones, x.device), out=out)


@dataclass
class _Border:
    """A sum over all pixels, and what the border has in it: (2, *) the first and last row, column; (2, 2, *) corners.

    Attributes:
        total: (*).
        rows: (2, *).
        columns: (2, *).
        corners: (2, 2, *), by row and column.
    """

    total: Tensor
    rows: Tensor
    columns: Tensor
    corners: Tensor

    def lacking(self, row: int, column: int) -> Tensor:
        """The sum without what `_Block.row` and `_Block.column` say that it lacks."""
        value = self.total
        last = {0: 1, 2: 0}  # the place's row or column → which border row or column its patches cannot have there
        if row in last:
            value = value - self.rows[last[row]]
        if column in last:
            value = value - self.columns[last[column]]
        if row in last and column in last:
            value = value + self.corners[last[row], last[column]]
        return value


def _raw_sums(x: Tensor, ones: bool) -> Tensor:
    """What the sum is made of, flat, as it adds up over samples: (C, C) each, and with ones (C,) each.

    For each of `_SHIFTS` the whole image; for each shift of 0, 1, 2 along them both border rows, then both columns; the
    corners. With ones the image, rows, columns and corners again, the pixels themselves in place of their products.
    """
    x = x.to(sum_dtype(x), memory_format=torch.channels_last)  # in which all below runs faster, with the copy
    rows = torch.stack([x[:, :, 0], x[:, :, -1]]).permute(0, 3, 1, 2).contiguous()  # (2, W, N, C)
    columns = torch.stack([x[..., 0], x[..., -1]]).permute(0, 3, 1, 2).contiguous()  # (2, H, N, C)
    ends = torch.stack([rows[:, 0], rows[:, -1]], dim=1)  # (2, 2, N, C)
    corners = cross_moment(ends.flatten(0, 1), ends.flatten(0, 1))
    parts = [*_shifted_moments(x), *_moments_along(rows), *_moments_along(columns), corners]
    if ones:
        parts += [x.sum(dim=(0, 2, 3)), rows.sum(dim=(1, 2)), columns.sum(dim=(1, 2)), ends.sum(dim=2)]
    return torch.cat([part.flatten() for part in parts])


def _distinct_values(raw: Tensor, channels: int, num_patches: int, ones: bool) -> Tensor:
    """The values of which `_triangle_index` makes the sum: every distinct block, (29, C, C) in the order of `_BLOCKS`.

    With ones then Σ a, (9, C), and the number of patches.
    """
    along = _FARTHEST + 1
    counts = [len(_SHIFTS), 2 * along, 2 * along, 4]
    moments = raw[: sum(counts) * channels**2].view(-1, channels, channels).split(counts)
    blocks, corners = list(moments[0]), moments[3].view(2, 2, channels, channels)
    rows, columns = (edges.view(along, 2, channels, channels) for edges in moments[1:3])
    for of in _BLOCKS[len(_SHIFTS) :]:
        full = blocks[_SHIFTS.index(_Block(of.rows, of.columns))]
        blocks.append(_Border(full, rows[of.columns], columns[of.rows], corners).lacking(of.row, of.column))
    values = torch.stack(blocks).flatten()
    if not ones:
        return values
    total, row_sums, column_sums, ends = raw[sum(counts) * channels**2 :].view(-1, channels).split([1, 2, 2, 4])
    sums = _Border(total[0], row_sums, column_sums, ends.view(2, 2, channels))
    patch_sum = torch.stack([sums.lacking(row, column) for row, column in _PLACES])
    return torch.cat([values, patch_sum.flatten(), raw.new_tensor([num_patches])])


def _shifted_moments(x: Tensor) -> list[Tensor]:
    """Σ pixel[p] · pixel[p + shift]ᵀ for each of `_SHIFTS`: (N, C, H, W) → (C, C) each."""
    _, channels, height, width = x.shape
    down, across = min(_FARTHEST, height - 1), min(_FARTHEST, width - 1)  # no pixels lie farther apart
    shape = (channels, channels, down + 1, 2 * across + 1)
    zeros = (across, across, 0, down)  # left, right, above, below
    moments = conv2d_weight(pad(x, zeros), shape, x)
    return [
        moments[:, :, shift.rows, across + shift.columns]
        if shift.rows <= down and abs(shift.columns) <= across
        else x.new_zeros(channels, channels)
        for shift in _SHIFTS
    ]


def _moments_along(lines: Tensor) -> list[Tensor]:
    """Σ pixel[i] · pixel[i + shift]ᵀ along lines of pixels for the shifts 0, 1, 2: (k, L, N, C) → (k, C, C) each."""
    length = lines.shape[1]
    return [cross_moment(lines[:, : max(0, length - shift)], lines[:, shift:]) for shift in range(_FARTHEST + 1)]


@lru_cache(maxsize=64)
def _triangle_index(channels: int, ones: bool, device: torch.device) -> Tensor:
    """For each value of the packed sum its place among the blocks' values, the sums and the number of patches."""
    numbers = torch.empty(9, 9, dtype=torch.int32)
    for (upper, lower), block in _PAIRS.items():
        numbers[upper, lower] = numbers[lower, upper] = _BLOCKS.index(block)
    within = torch.arange(channels**2, dtype=torch.int32).view(channels, 1, channels, 1)
    is_upper = torch.ones(9, 9, dtype=torch.bool).triu()[:, None]
    index = numbers[:, None] * channels**2 + torch.where(is_upper, within, within.transpose(0, 2))
    index = index.view(9 * channels, 9 * channels)  # rows and columns by channel, then place, as the weight has them
    if ones:
        sums = (
            torch.arange(9 * channels, dtype=torch.int32).view(9, channels).T.reshape(-1, 1)
            + len(_BLOCKS) * channels**2
        )
        index = torch.cat([torch.cat([index, sums], dim=1), index.new_full((1, 9 * channels + 1), int(sums.max()) + 1)])
    return torch.cat([row[start:] for start, row in enumerate(index)]).to(device)

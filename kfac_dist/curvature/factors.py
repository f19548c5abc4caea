"""Kronecker factors of a layer from its activations and gradients (CVPR 2019, section 3; Grosse & Martens 2016).

    N   samples;  T  positions of a sample, the pixels of a convolution's output, say
    a   the layer's input at one position (for a convolution a patch), with a trailing 1 where there is a bias
    g   gradient of the *mean* loss at the layer's output at one position, so N g is a sample's own
    A   input factor, (1/N) Σ_n Σ_t a aᵀ
    G   output factor, (1/(N·T)) Σ_n Σ_t (N g)(N g)ᵀ
    k   groups of the layer, independent blocks of its Fisher; 1 but for grouped convolutions

A layer's a and g at all N·T positions are arranged as rows (k, N·T, features) first. Their second moment, (k, n, n), is
the same sum for every layer, and scaled it is A or G. What the scaling needs to know is N; the rows' order is free.

Half-precision rows are multiplied as they are, on Tensor Cores, but summed and returned in fp32: a sum over 400,000
rows would neither fit fp16 (65,504 at most) nor keep its digits.
"""

from functools import partial

import torch
from torch import Tensor

from kfac_dist.curvature.chunks import sample_chunks, sum_over


def input_factor(moment: Tensor, num_samples: int) -> Tensor:
    """A = (1/N) Σ_n Σ_t a aᵀ.

    Args:
        moment: Σ_n Σ_t a aᵀ, (k, n, n); overwritten.
        num_samples: N.

    Returns:
        (k, n, n).
    """
    return moment.div_(num_samples)


def output_factor(moment: Tensor, num_samples: int, num_rows: int) -> Tensor:
    """G = (1/(N·T)) Σ_n Σ_t (N g)(N g)ᵀ.

    Args:
        moment: Σ_n Σ_t g gᵀ, (k, n, n); overwritten.
        num_samples: N.
        num_rows: N·T.

    Returns:
        (k, n, n).
    """
    return moment.mul_(num_samples**2 / num_rows)


def second_moment(rows: Tensor, ones: bool = False) -> Tensor:
    """Σ row · rowᵀ.

    Args:
        rows: (k, R, n).
        ones: Whether each row is to end in a further 1, the input of a bias.

    Returns:
        (k, n, n), one larger with ones.
    """
    moment = cross_moment(rows, rows)
    return append_ones(moment, rows.sum(dim=1, dtype=moment.dtype), rows.shape[1]) if ones else moment


def pixel_rows(images: Tensor, groups: int) -> Tensor:
    """Each pixel's channels: (N, C, H, W) → (groups, N·H·W, C/groups).

    A view of a channels-last tensor with one group; otherwise a copy, since the products need it.
    """
    num_samples, channels, height, width = images.shape
    split = images.permute(0, 2, 3, 1).reshape(num_samples * height * width, groups, channels // groups)
    return split.transpose(0, 1)


def pixel_moment(images: Tensor, groups: int) -> Tensor:
    """Σ pixel · pixelᵀ: (N, C, H, W) → (groups, C/groups, C/groups)."""
    chunks = sample_chunks(images, sum_numel=images.shape[1] ** 2 // groups)
    return sum_over(chunks, _image_moment if image_moment_pays(images, groups) else partial(_row_moment, groups=groups))


def image_moment_pays(images: Tensor, groups: int) -> bool:
    """Whether a product for each image is faster than one of `pixel_rows`, which must be copied together for it.

    Measured on a CPU with 8 to 512 channels: with as many pixels as channels both take as long, with 16 times as many
    it takes a third to two thirds of the time. On a GPU nothing was measured yet.
    """
    _, channels, height, width = images.shape
    return images.device.type == "cpu" and groups == 1 and images.is_contiguous() and height * width >= channels


def _image_moment(images: Tensor) -> Tensor:
    pixels = images.to(sum_dtype(images)).flatten(2)
    return torch.bmm(pixels, pixels.mT).sum(dim=0, keepdim=True)


def _row_moment(images: Tensor, groups: int) -> Tensor:
    if images.device.type == "cpu":
        images = images.to(sum_dtype(images))  # before they are arranged, which is slower in half precision
    return second_moment(pixel_rows(images, groups))


def cross_moment(first: Tensor, second: Tensor) -> Tensor:
    """Σ over all but the outer dimensions of first · secondᵀ: (k, *, m) and (k, *, n) → (k, m, n)."""
    first, second = first.flatten(1, -2), second.flatten(1, -2)
    if first.dtype != sum_dtype(first):
        if first.device.type != "cpu":
            if first.shape[0] == 1:
                return torch.mm(first[0].T, second[0], out_dtype=torch.float32)[None]
            return torch.bmm(first.mT, second, out_dtype=torch.float32)
        first, second = first.float(), second.float()  # the CPU has no such product; this one is the same to rounding
    if first.shape[0] == 1:  # a plain product is faster than a batch of one
        return torch.mm(first[0].T, second[0])[None]
    return torch.bmm(first.mT, second)


def append_ones(moment: Tensor, row_sum: Tensor, num_rows: int) -> Tensor:
    """Second moment of rows with a trailing 1, from that of the rows without and their sum (k, n)."""
    size = moment.shape[-1]
    extended = moment.new_empty(moment.shape[0], size + 1, size + 1)
    extended[:, :size, :size] = moment
    extended[:, :size, size] = row_sum
    extended[:, size, :size] = row_sum
    extended[:, size, size] = num_rows
    return extended


def sum_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums over rows of x."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype

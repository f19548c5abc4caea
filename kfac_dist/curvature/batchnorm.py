"""Fisher of BatchNorm's scale and shift (CVPR 2019, sections 3.1 and 4.3).

    h    normalised input of the layer, before scale (gamma) and shift (beta)
    j_n  one sample's gradient, [Σ_t N g h, Σ_t N g]: C values of gamma, then C of beta
    F    (1/N) Σ_n j_n j_nᵀ, in one of three forms

Every form is a stack of symmetric matrices, so that the rest of the program need not know which one it is:

    full      (1, 2C, 2C)   all pairs
    unit      (C, 2, 2)     gamma and beta of one channel
    diagonal  (2C, 1, 1)    each value alone
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.curvature.chunks import sample_chunks
from kfac_dist.curvature.factors import sum_dtype
from kfac_dist.vocabulary import BatchNormForm

# Values of x that a CPU takes at once for each thread: with g and what is computed of both they stay in its cache.
# Measured with 16 to 2,048 channels, 0.3 to 34 million values, fp32 and bf16: a half to a tenth of the time of a whole
# batch; only small ones in fp32, of up to `_WHOLE_NUMEL` values, lose more by putting chunks together.
_CHUNK_NUMEL = 1 << 18
_WHOLE_NUMEL = 1 << 21


def batchnorm_fisher(x: Tensor, g: Tensor, eps: float, form: BatchNormForm) -> Tensor:
    """F of a BatchNorm layer in training mode.

    Computed from the layer's input rather than its output, so it holds where gamma is 0 and where a following
    in-place activation has overwritten the output.

    Args:
        x: Layer input, (N, C, *).
        g: Gradient of the mean loss at the layer's output, (N, C, *).
        eps: The layer's epsilon.
        form: Which entries to keep.

    Returns:
        Stack of symmetric matrices, shape by `stack_shape`.
    """
    num_samples = x.shape[0]
    j = sample_gradients(x, g, eps)
    if form == "full":
        return (j.T @ j).div_(num_samples)[None]
    if form == "diagonal":
        return j.square().mean(dim=0)[:, None, None]
    pairs = j.view(num_samples, 2, -1)
    return torch.einsum("nic, njc -> cij", pairs, pairs).div_(num_samples)


def sample_gradients(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """Each sample's own gradient of gamma and beta; arguments as for `batchnorm_fisher`.

    Returns:
        (N, 2C), in fp32 for half-precision arguments.
    """
    if x.is_cuda:
        return _sample_gradients_on_gpu(x, g, eps)
    num_samples = x.shape[0]
    if x.dim() == 2:  # BatchNorm1d without a length
        x, g = x[..., None], g[..., None]
    x, g = x.flatten(2), g.flatten(2)
    stays_whole = x.dtype == sum_dtype(x) and x.numel() <= _WHOLE_NUMEL
    numel = x.numel() if stays_whole else _CHUNK_NUMEL
    parts = [_chunk_sums(*chunk) for chunk in zip(sample_chunks(x, numel), sample_chunks(g, numel), strict=True)]
    values = num_samples * x.shape[2]
    if len(parts) == 1:
        ((gamma_gradients, beta_gradients, _, squares),) = parts
    else:  # each chunk is centred by its own mean
        means = torch.stack([part.mean for part in parts])
        counts = [len(part.beta_gradients) for part in parts]
        weights = means.new_tensor(counts)[:, None] / num_samples
        offsets = means - (weights * means).sum(dim=0)
        squares = torch.stack([part.squares for part in parts]).sum(dim=0)
        squares += values * (weights * offsets.square()).sum(dim=0)
        gamma_gradients = torch.cat(
            [
                part.gamma_gradients.addcmul_(part.beta_gradients, offset)
                for part, offset in zip(parts, offsets, strict=True)
            ]
        )
        beta_gradients = torch.cat([part.beta_gradients for part in parts])
    gamma_gradients *= torch.rsqrt(squares / values + eps)
    return torch.cat([gamma_gradients, beta_gradients], dim=1).mul_(num_samples)


def _sample_gradients_on_gpu(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """`sample_gradients` in seven launches and one tensor of x's shape; half precision is read as it is."""
    num_samples, channels = x.shape[:2]
    mean, scale = torch.batch_norm_stats(x, eps)  # scale: 1/√(variance + eps); both in fp32 for half precision
    product = x - mean.view(channels, *[1] * (x.dim() - 2))
    product *= g
    j = mean.new_empty(num_samples, 2, channels)
    for values, sums in ((product, j[:, 0]), (g, j[:, 1])):
        torch.sum(values.reshape(num_samples, channels, -1), dim=2, dtype=j.dtype, out=sums)
    j[:, 0].mul_(scale)
    return j.view(num_samples, -1).mul_(num_samples)


class _ChunkSums(NamedTuple):
    """What `sample_gradients` needs of some samples, for each of C channels.

    Attributes:
        gamma_gradients: Σ_t g · (x - mean), (samples, C).
        beta_gradients: Σ_t g, (samples, C).
        mean: Of x over the samples, (C,).
        squares: Σ_n Σ_t (x - mean)², (C,).
    """

    gamma_gradients: Tensor
    beta_gradients: Tensor
    mean: Tensor
    squares: Tensor


def _chunk_sums(x: Tensor, g: Tensor) -> _ChunkSums:
    """Sums of samples (n, C, T); in fp32 for half precision."""
    dtype = sum_dtype(x)
    x, g = x.to(dtype), g.to(dtype)
    # Reductions over the innermost dimension are several times faster on a CPU than var_mean over (0, 2).
    mean = x.sum(dim=2, dtype=dtype).sum(dim=0) / (x.shape[0] * x.shape[2])
    centred = x - mean[:, None]
    squares = centred.square().sum(dim=2).sum(dim=0)
    return _ChunkSums((centred * g).sum(dim=2), g.sum(dim=2, dtype=dtype), mean, squares)


def stack_shape(num_channels: int, form: BatchNormForm) -> tuple[int, int]:
    """Matrices in the stack and rows of each, for a layer of C channels."""
    return {"full": (1, 2 * num_channels), "unit": (num_channels, 2), "diagonal": (2 * num_channels, 1)}[form]


def split_gradient(gradient: Tensor, form: BatchNormForm) -> Tensor:
    """Arrange a gradient [gamma, beta] (2C,) as the stack's vectors, (matrices, rows)."""
    count, size = stack_shape(gradient.numel() // 2, form)
    return gradient.view(2, -1).T if form == "unit" else gradient.view(count, size)


def join_gradient(vectors: Tensor, form: BatchNormForm) -> Tensor:
    """Undo `split_gradient`: (matrices, rows) → (2C,)."""
    return vectors.T.flatten() if form == "unit" else vectors.flatten()

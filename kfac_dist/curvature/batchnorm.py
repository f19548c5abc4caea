"""Fisher of BatchNorm's scale and shift (CVPR 2019, sections 3.1 and 4.3).

    h    normalised input of the layer, before scale (gamma) and shift (beta)
    j_n  one sample's gradient, [Σ_t N g h, Σ_t N g]: C values of gamma, then C of beta
    F    (1/N) Σ_n j_n j_nᵀ, in one of three forms

Every form is a stack of symmetric matrices, so that the rest of the program need not know which one it is:

    full      (1, 2C, 2C)   all pairs
    unit      (C, 2, 2)     gamma and beta of one channel
    diagonal  (2C, 1, 1)    each value alone
"""

import torch
from torch import Tensor

from kfac_dist.vocabulary import BatchNormForm


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
    num_samples = x.shape[0]
    if x.dim() == 2:  # BatchNorm1d without a length
        x, g = x[..., None], g[..., None]
    x, g = x.flatten(2), g.flatten(2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # of sums; half precision is read as it is
    # Reductions over the innermost dimension are several times faster on a CPU than var_mean over (0, 2).
    values = num_samples * x.shape[2]
    centred = x - (x.sum(dim=2, dtype=dtype).sum(dim=0) / values)[:, None]
    var = centred.square().sum(dim=2).sum(dim=0) / values
    gamma_gradients = (centred * g).sum(dim=2) * torch.rsqrt(var + eps)
    return torch.cat([gamma_gradients, g.sum(dim=2, dtype=dtype)], dim=1).mul_(num_samples)


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

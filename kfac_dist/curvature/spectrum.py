"""Eigenvalues of the Fisher's matrices, for a look at how they are conditioned."""

import torch
from torch import Tensor


def spectrum(stack: Tensor) -> Tensor:
    """Smallest and largest eigenvalue and effective rank of a stack, seen as one block-diagonal matrix.

    The effective rank is exp(−Σ p ln p) of the eigenvalues' shares p of their sum (Roy & Vetterli 2007): n for n equal
    eigenvalues, 1 for a single one that is not zero.

    Args:
        stack: (k, n, n), symmetric positive semi-definite.

    Returns:
        (3,) float64: smallest, largest, effective rank.
    """
    eigenvalues = torch.linalg.eigvalsh(stack).flatten().double()
    shares = eigenvalues.clamp(min=0)  # semi-definite by construction, slightly negative by rounding
    shares = shares / shares.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return torch.stack([eigenvalues.min(), eigenvalues.max(), entropy.exp()])

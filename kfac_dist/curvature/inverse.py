"""Damping (Eq. 12), factorisation and preconditioning of the Fisher's blocks.

    A, G     input and output factor of a layer, stacks (k, n, n)
    gamma    damping
    pi       balance of the damping between A and G
    L        lower Cholesky factor of a damped matrix

A matrix that is refreshed soon is kept as its Cholesky factor: solving with it takes as many operations as multiplying
by the inverse, which costs twice as many again as the factor to form. A matrix that serves many iterations is kept as
its inverse, because products run faster than triangular solves; so are the many tiny ones of BatchNorm.

Nothing here waits for the device: whether a factorisation succeeded is a tensor.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def pi_ratio(A: Tensor, G: Tensor) -> Tensor:
    """Balance pi = √((tr A / dim A) / (tr G / dim G)), for each pair of a stack; 1 where a trace is not positive.

    Args:
        A: (k, n, n).
        G: (k, m, m).

    Returns:
        (k,).
    """
    mean_A, mean_G = _mean_diagonal(A), _mean_diagonal(G)
    usable = (mean_A > 0) & (mean_G > 0)
    return torch.where(usable, mean_A / mean_G, torch.ones_like(mean_A)).sqrt()


def damping_shifts(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What Eq. 12 in factored form adds to the diagonals: pi·√gamma to A's and √gamma/pi to G's.

    Args:
        A: (k, n, n).
        G: (k, m, m).
        damping: gamma > 0.

    Returns:
        Two tensors (k,).

    Raises:
        ValueError: If damping is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    pi = pi_ratio(A, G)
    return pi * damping**0.5, damping**0.5 / pi


def damp_factors(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Split Tikhonov damping between the two Kronecker factors (Eq. 12, factored form).

    Args:
        A: Input factors, (k, n, n), symmetric positive semi-definite.
        G: Output factors, (k, m, m), likewise.
        damping: gamma > 0.

    Returns:
        New damped stacks of the same shapes; the arguments are unchanged.

    Raises:
        ValueError: If damping is not positive.
    """
    shift_A, shift_G = damping_shifts(A, G, damping)
    return add_to_diagonal(A, shift_A), add_to_diagonal(G, shift_G)


def add_to_diagonal(stack: Tensor, shift: Tensor) -> Tensor:
    """A copy of the stack (k, n, n) with shift (k,) added to the matrices' diagonals."""
    damped = stack.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    return damped


# Matrices up to this size are factorised in one call a size; a larger one fills a GPU alone, and batched kernels are
# made for small ones. Not yet measured on a GPU; on a CPU it makes no difference.
_BATCHED_UP_TO = 512


def batched_cholesky(stacks: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Cholesky factors of damped stacks; small matrices of one size are factorised in one batch.

    Args:
        stacks: Stacks of symmetric matrices, (k_i, n_i, n_i); unchanged.
        shifts: Values to add to the diagonals, (k_i,) each.

    Returns:
        For each stack its lower factors (k_i, n_i, n_i), and a scalar that is true where one of its matrices was not
        positive definite; the factors mean nothing then.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for group in _groups_by_size(stacks):
        batch = torch.cat([stacks[index] for index in group])
        batch.diagonal(dim1=-2, dim2=-1).add_(torch.cat([shifts[index] for index in group])[:, None])
        factors, info = torch.linalg.cholesky_ex(batch)
        lengths = [stacks[index].shape[0] for index in group]
        failures = torch._foreach_norm(list(info.float().split(lengths)))
        for index, factor, failure in zip(group, factors.split(lengths), failures, strict=True):
            results[index] = factor, failure != 0
    return [results[index] for index in range(len(stacks))]


def _groups_by_size(stacks: Sequence[Tensor]) -> list[list[int]]:
    """Places of the stacks that are factorised together."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        size = stack.shape[-1]
        groups[size, 0 if size <= _BATCHED_UP_TO else index].append(index)
    return list(groups.values())


# BatchNorm's matrices, thousands of them: a solve with each would cost a GPU a launch each.
_TINY = 2


@dataclass(frozen=True)
class Solver:
    """A damped stack of matrices in the form that it is solved with.

    Attributes:
        matrix: (k, n, n), lower Cholesky factors or inverses.
        is_inverse: Which of the two.
    """

    matrix: Tensor
    is_inverse: bool = False

    @classmethod
    def create(cls, factors: Tensor, serves_long: bool) -> "Solver":
        """The form that suits best.

        Args:
            factors: Lower Cholesky factors, (k, n, n).
            serves_long: Whether many iterations will use it.
        """
        solver = cls(factors)
        return solver.inverted() if serves_long or factors.shape[-1] <= _TINY else solver

    @classmethod
    def identity(cls, stack: Tensor) -> "Solver":
        """What changes nothing, for a stack of this shape."""
        size = stack.shape[-1]
        return cls(torch.eye(size, dtype=stack.dtype, device=stack.device).expand_as(stack), is_inverse=True)

    def inverted(self) -> "Solver":
        """The same matrices as explicit inverses."""
        if self.is_inverse:
            return self
        size = self.matrix.shape[-1]
        if size > _TINY:
            return Solver(torch.cholesky_inverse(self.matrix), is_inverse=True)
        identity = torch.eye(size, dtype=self.matrix.dtype, device=self.matrix.device)
        half = torch.linalg.solve_triangular(self.matrix, identity.expand_as(self.matrix), upper=False)
        return Solver(half.mT @ half, is_inverse=True)  # one launch where cholesky_inverse takes one a matrix

    def unless(self, failed: Tensor, previous: "Solver") -> "Solver":
        """This one, or the previous one where the scalar `failed` is true; decided on the device."""
        if self.is_inverse != previous.is_inverse:
            return self.inverted().unless(failed, previous.inverted())
        return Solver(torch.where(failed, previous.matrix, self.matrix), self.is_inverse)

    def solve(self, right: Tensor) -> Tensor:
        """Inverse times `right`, (k, n, m)."""
        if not self.is_inverse:
            return torch.cholesky_solve(right, self.matrix)
        return self.matrix * right if self.matrix.shape[-1] == 1 else torch.bmm(self.matrix, right)

    def solve_right(self, left: Tensor) -> Tensor:
        """`left`, (k, m, n), times the inverse."""
        return torch.bmm(left, self.matrix) if self.is_inverse else self.solve(left.mT).mT


def precondition_kronecker(gradient: Tensor, A: Solver, G: Solver) -> Tensor:
    """G⁻¹ ∇L A⁻¹ for a layer's weight matrices.

    Args:
        gradient: (k, m, n), the weight's gradient, bias as the last column; k groups.
        A: Solver of the damped A, (k, n, n).
        G: Likewise of G, (k, m, m).

    Returns:
        (k, m, n).
    """
    return A.solve_right(G.solve(gradient))


def precondition_vectors(gradient: Tensor, F: Solver) -> Tensor:
    """F⁻¹ ∇L for a stack of independent blocks.

    Args:
        gradient: (k, n, 1).
        F: Solver of the damped F, (k, n, n).

    Returns:
        (k, n, 1).
    """
    return F.solve(gradient)


def _mean_diagonal(stack: Tensor) -> Tensor:
    return stack.diagonal(dim1=-2, dim2=-1).mean(dim=-1)

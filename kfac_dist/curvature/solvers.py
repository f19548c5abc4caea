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
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def pi_ratio(mean_A: Tensor, mean_G: Tensor) -> Tensor:
    """Balance pi = √((tr A / dim A) / (tr G / dim G)); 1 where a trace is not positive.

    Args:
        mean_A: Mean diagonal entries tr A / dim A, (k,).
        mean_G: Likewise of G, (k,).

    Returns:
        (k,).
    """
    usable = (mean_A > 0) & (mean_G > 0)
    return torch.where(usable, mean_A / mean_G, torch.ones_like(mean_A)).sqrt()


def damping_shifts(mean_A: Tensor, mean_G: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """What Eq. 12 in factored form adds to the diagonals: pi·√gamma to A's and √gamma/pi to G's.

    Args:
        mean_A: Mean diagonal entries of each A, (k,).
        mean_G: Likewise of each G, (k,).
        damping: gamma > 0 of each, (k,).

    Returns:
        Two tensors (k,).
    """
    pi, root = pi_ratio(mean_A, mean_G), damping.sqrt()
    return pi * root, root / pi


# Matrices up to this size are factorised in one call a size; a larger one fills a GPU alone, and batched kernels are
# made for small ones. Not yet measured on a GPU; on a CPU it makes no difference.
_BATCHED_UP_TO = 512


class StackBatches:
    """Copies of stacks of matrices, of which small ones of one size are worked on together."""

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        """Copy the stacks, (k_i, n_i, n_i), at least one."""
        self._lengths = [stack.shape[0] for stack in stacks]
        self._groups = _groups_by_size(stacks)
        self._batches = [torch.cat([stacks[index] for index in group]) for group in self._groups]

    def mean_diagonals(self) -> list[Tensor]:
        """Mean diagonal entry of each matrix of each stack, (k_i,)."""
        return self._split([mean_diagonals(batch) for batch in self._batches])

    def add_to_diagonals(self, shifts: Sequence[Tensor]) -> None:
        """Add a value to the diagonal of each matrix, (k_i,) for each stack."""
        for group, batch in zip(self._groups, self._batches, strict=True):
            batch.diagonal(dim1=-2, dim2=-1).add_(torch.cat([shifts[index] for index in group])[:, None])

    def factorise(self) -> tuple[list["Solver"], Tensor]:
        """Cholesky factors of all matrices, in their place; of tiny ones the inverses.

        Returns:
            A solver for each stack; and (stacks,) bool, true where a matrix of the stack was not positive definite,
            in which case its solver means nothing.
        """
        factors, infos, lasts = [], [], []
        for batch in self._batches:
            factor = batch.mT  # symmetric, so nothing but its order in memory, which is the routines', is another
            info = torch.empty(len(batch), dtype=torch.int32, device=batch.device)
            torch.linalg.cholesky_ex(factor, out=(factor, info))
            infos.append(info)
            lasts.append(factor[:, -1, -1])
            factors.append(Solver(factor).inverted() if batch.shape[-1] <= _TINY else Solver(factor))
        order = [index for group in self._groups for index in group]
        # CUDA reports no failure for a matrix with a nan (pytorch/pytorch#64818). It reaches the factor's last diagonal
        # entry, and 0 times nan is not 0.
        failures = torch.cat(infos) + 0 * torch.cat(lasts)
        by_stack = failures.split([self._lengths[index] for index in order])
        norms = dict(zip(order, torch._foreach_norm(list(by_stack)), strict=True))
        failed = torch.stack([norms[index] for index in range(len(norms))]) != 0
        matrices = self._split([solver.matrix for solver in factors])
        is_inverse = {
            index: solver.is_inverse for group, solver in zip(self._groups, factors, strict=True) for index in group
        }
        return [Solver(matrix, is_inverse[index]) for index, matrix in enumerate(matrices)], failed

    def _split(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Parts of tensors, one for each batch, by stack."""
        parts: dict[int, Tensor] = {}
        for group, batch in zip(self._groups, batches, strict=True):
            parts |= zip(group, batch.split([self._lengths[index] for index in group]), strict=True)
        return [parts[index] for index in range(len(parts))]


def mean_diagonals(stack: Tensor) -> Tensor:
    """Mean diagonal entry of each matrix of (k, n, n), (k,)."""
    return stack.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def _groups_by_size(stacks: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the stacks that are factorised together."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        size = stack.shape[-1]
        groups[size, 0 if size <= _BATCHED_UP_TO else index].append(index)
    return list(groups.values())


# BatchNorm's matrices, thousands of them: a solve with each would cost a GPU a launch each.
_TINY = 2

# Rows from which two triangular solves are faster than LAPACK's routine for both, on a CPU by 1.1 to 1.6 times where
# there are fewer columns than rows; small ones are slower, by up to 3 times (docs/design.md). Not measured on a GPU.
_SOLVED_BY_TRIANGLES_FROM = 257


@dataclass(frozen=True)
class Solver:
    """A damped stack of matrices in the form that it is solved with.

    Attributes:
        matrix: (k, n, n), lower Cholesky factors or inverses.
        is_inverse: Which of the two.
        spare: Contiguous memory for the first result of its shape, but for small Cholesky factors'; then it is gone,
            since a block may use several results at once. Others take new memory.
    """

    matrix: Tensor
    is_inverse: bool = False
    spare: list[Tensor] = field(default_factory=list, compare=False)

    def into(self, out: Tensor) -> "Solver":
        """This one, writing its first result of this shape to `out`, in which no right-hand side may lie."""
        return replace(self, spare=[out])

    @classmethod
    def restored(cls, matrix: Tensor, is_inverse: bool) -> "Solver":
        """One from a checkpoint, which brings every matrix back row by row: laid out as it was made.

        Routines give Cholesky factors column by column, and solving rounds otherwise with rows, so that a resumed run
        would leave the uninterrupted one.
        """
        return cls(matrix.contiguous() if is_inverse else matrix.mT.contiguous().mT, is_inverse)

    def identity(self) -> "Solver":
        """What changes nothing, in this one's shape and form: the identity is its own Cholesky factor and inverse."""
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return Solver((eye if self.is_inverse else eye.mT).expand_as(self.matrix), self.is_inverse)

    def inverted(self) -> "Solver":
        """The same matrices as explicit inverses.

        They lie in memory row by row, as a checkpoint brings them back: products with the columns one after another
        would round otherwise, and a resumed run would leave the uninterrupted one. Routines that return columns
        return as good an inverse in rows, its transpose.
        """
        if self.is_inverse:
            return self
        size = self.matrix.shape[-1]
        if size == 1:
            return Solver(self.matrix.square().reciprocal(), is_inverse=True)
        if size > _TINY and self.matrix.device.type == "cpu":
            return Solver(torch.cholesky_inverse(self.matrix).mT, is_inverse=True)
        identity = self.identity().matrix
        if size > _TINY:  # what cholesky_inverse does on a GPU, less a check that would make the host wait
            return Solver(torch.cholesky_solve(identity, self.matrix).mT, is_inverse=True)
        half = torch.linalg.solve_triangular(self.matrix, identity, upper=False)
        return Solver(half.mT @ half, is_inverse=True)  # one launch where cholesky_inverse takes one a matrix

    def unless(self, failed: Tensor) -> "Solver":
        """This one, or what changes nothing where the scalar `failed` is true; decided on the device."""
        return Solver(torch.where(failed, self.identity().matrix, self.matrix), self.is_inverse)

    def overwrite(self, new: "Solver", failed: Tensor | None) -> None:
        """Take over the values of one of the same form, in this one's memory.

        Args:
            new: The other one.
            failed: Scalar, true where nothing is to change, which the device decides; None if it has not failed.
        """
        assert self.is_inverse == new.is_inverse
        if failed is None:
            self.matrix.copy_(new.matrix)
        else:
            torch.where(failed, self.matrix, new.matrix, out=self.matrix)

    def solve(self, right: Tensor) -> Tensor:
        """Inverse times `right`, (k, n, m)."""
        out = self._out_for(right)
        if self.matrix.shape[-1] == 1 and self.is_inverse:
            return torch.mul(self.matrix, right, out=out)
        if self.is_inverse:
            return multiply(self.matrix, right, out)
        if self.matrix.shape[-1] < _SOLVED_BY_TRIANGLES_FROM:
            return torch.cholesky_solve(right, self.matrix)
        solved = torch.empty_like(right, memory_format=torch.contiguous_format) if out is None else out
        torch.linalg.solve_triangular(self.matrix, right, upper=False, out=solved)
        torch.linalg.solve_triangular(self.matrix.mT, solved, upper=True, out=solved)
        return solved

    def solve_right(self, left: Tensor) -> Tensor:
        """`left`, (k, m, n), times the inverse."""
        out = self._out_for(left)
        if self.is_inverse:
            return multiply(left, self.matrix, out)
        if self.matrix.shape[-1] < _SOLVED_BY_TRIANGLES_FROM:
            return torch.cholesky_solve(left.mT, self.matrix).mT
        memory = torch.empty_like(left, memory_format=torch.contiguous_format) if out is None else out
        solved = memory.view(left.mT.shape).mT  # column by column, which is a fifth faster
        torch.linalg.solve_triangular(self.matrix.mT, left, upper=True, left=False, out=solved)
        torch.linalg.solve_triangular(self.matrix, solved, upper=False, left=False, out=solved)
        return solved

    def _out_for(self, given: Tensor) -> Tensor | None:
        """Memory for the result from a stack, if there is some of its shape."""
        return self.spare.pop() if self.spare and self.spare[0].shape == given.shape else None


# Multiplications in a product from which it is worth being shared out over threads; measured on two.
_SHARED_FROM = 1 << 20


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of two stacks, pair by pair.

    On a CPU a batched product gives each thread whole matrices, so that with three large ones on two threads one thread
    has nothing to do for a third of the time; then they are multiplied one by one, by all threads.

    Args:
        left: (k, m, n).
        right: (k, n, p).
        out: (k, m, p), overwritten; None takes new memory.

    Returns:
        (k, m, p).
    """
    count, threads = len(left), torch.get_num_threads()
    turns = -(-count // threads)
    keeps_busy = turns * threads <= 1.1 * count
    if left.device.type != "cpu" or keeps_busy or left[0].numel() * right.shape[-1] < _SHARED_FROM:
        return torch.bmm(left, right, out=out)
    if out is None:
        out = left.new_empty(count, left.shape[1], right.shape[2])
    for number in range(count):
        torch.mm(left[number], right[number], out=out[number])
    return out


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

"""Stage 5: 𝒢 of many blocks, those of one shape together.

A network has far fewer shapes than layers, and a GPU spends longer on being told to start a small product than on the
product. So the inverses of blocks of one shape lie behind one another in memory, and one product serves all of them.
Blocks with Cholesky factors, which serve a few iterations only, are not worth the copy and are solved one by one.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.running import BlockCurvature
from kfac_dist.curvature.solvers import Solver

# Values of a group of blocks from which it is worked on in memory that is kept, and passed on by itself: with fewer
# that costs a CPU more (20 to 45 µs) than fresh memory does. Not measured on a GPU.
_KEPT_FROM = 1 << 15


class Preconditioner:
    """Applies the blocks' inverses; remembers which solvers lie behind one another already.

    It keeps memory for one group of blocks, in which all large ones are worked on in turn: taking fresh memory in every
    iteration costs a CPU 7 % of a ResNet-50's stage 5.
    """

    def __init__(self) -> None:
        self._joined: dict[tuple[Hashable, str], tuple[list[Solver], Solver]] = {}
        self._memory: dict[str, Tensor] = {}  # flat

    def apply(
        self, curvatures: Sequence[BlockCurvature], gradients: Sequence[Tensor]
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """𝒢 of each block; the plain gradient where there is no inverse yet.

        The blocks' solvers may be replaced by equal ones that share memory.

        Args:
            curvatures: The blocks with their solvers.
            gradients: Their flat gradients, (num_values,) each.

        Yields:
            For groups of blocks, number of each in `curvatures` and its 𝒢, (num_values,), which stands until the next
            group is asked for.
        """
        groups: dict[Hashable, list[int]] = {}
        for number, curvature in enumerate(curvatures):
            groups.setdefault(_shape(curvature), []).append(number)
        # What no group uses any more is freed.
        self._joined = {key: known for key, known in self._joined.items() if len(groups.get(key[0], ())) > 1}
        together = [(number, gradients[number]) for number in groups.pop(None, [])]
        for shape, numbers in groups.items():
            members = [curvatures[number] for number in numbers]
            is_large = sum(member.block.num_values for member in members) >= _KEPT_FROM
            arranged = [curvatures[number].block.arrange(gradients[number]) for number in numbers]
            whole = self._cat(arranged, is_large)
            solvers = {}
            for matrix in members[0].block.factor_shapes:
                solver = self._join(shape, matrix, members)
                solvers[matrix] = solver.into(self._take(matrix, whole)) if is_large else solver
            parts = members[0].block.solve(whole, solvers).split([len(part) for part in arranged])
            group = [
                (number, curvatures[number].block.flatten(part)) for number, part in zip(numbers, parts, strict=True)
            ]
            if is_large:
                yield group
            else:
                together += group
        if together:
            yield together

    def _cat(self, tensors: Sequence[Tensor], is_large: bool) -> Tensor:
        """The stacks behind one another, large ones in memory that is kept; one alone stays where it is."""
        if len(tensors) == 1:
            return tensors[0]
        if not is_large:
            return torch.cat(list(tensors))
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        return torch.cat(list(tensors), out=self._take("arranged", tensors[0], shape))

    def _take(self, name: str, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The memory of this name, of this shape or else as `like`; what it held before is gone."""
        size = torch.Size(shape or like.shape)
        held = self._memory.get(name)
        if held is None or held.numel() < size.numel() or held.dtype != like.dtype or held.device != like.device:
            self._memory[name] = held = like.new_empty(size.numel())
        return held[: size.numel()].view(size)

    def _join(self, shape: Hashable, matrix: str, members: Sequence[BlockCurvature]) -> Solver:
        """One for all of the members' solvers, whose memory they share."""
        if len(members) == 1:
            members[0].leave_shared_memory()  # of a group that it has left, or of its factorisation
            return members[0].solvers[matrix]
        solvers = [member.solvers[matrix] for member in members]
        known = self._joined.get((shape, matrix))
        if known is not None and len(known[0]) == len(solvers) and all(map(_is, known[0], solvers)):
            return known[1]
        whole = Solver(torch.cat([solver.matrix for solver in solvers]), solvers[0].is_inverse)
        parts = whole.matrix.split([len(solver.matrix) for solver in solvers])
        shared = [Solver(part, whole.is_inverse) for part in parts]
        for member, solver in zip(members, shared, strict=True):
            member.solvers[matrix] = solver
        self._joined[shape, matrix] = shared, whole
        return whole


def _shape(curvature: BlockCurvature) -> Hashable:
    """What blocks must have in common to be solved together; None for those that are not solved."""
    block, solvers = curvature.block, curvature.solvers
    if not block.factor_shapes or not solvers:
        return None
    if not all(solver.is_inverse for solver in solvers.values()):
        return block.name
    return block.solve, tuple((matrix, size) for matrix, (_, size) in block.factor_shapes.items())


def _is(first: object, second: object) -> bool:
    return first is second

"""Symmetric matrices as their upper triangle, and many tensors in one flat buffer.

Pure tensor code: nothing here communicates. A `FlatBuffer` is cut into one segment a rank, as the
V-collectives want it, and each segment into parts that are found again by key.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def triangle_numel(size: int) -> int:
    """Number of values in the upper triangle, diagonal included, of a `size` × `size` matrix."""
    return size * (size + 1) // 2


@lru_cache(maxsize=64)
def _triangle_index(size: int, device: torch.device) -> Tensor:
    """Row-major positions of the upper triangle in a flattened `size` × `size` matrix (int32: half the memory)."""
    rows, columns = torch.triu_indices(size, size, device=device)
    index: Tensor = (rows * size + columns).int()
    return index


@lru_cache(maxsize=64)
def _mirror_index(size: int, device: torch.device) -> Tensor:
    """For each entry of a flattened `size` × `size` matrix its position, or its mirror image's, in the triangle."""
    places = torch.empty(size, size, dtype=torch.int32, device=device)
    positions = torch.arange(triangle_numel(size), dtype=torch.int32, device=device)
    rows, columns = torch.triu_indices(size, size, device=device)
    places[rows, columns] = positions
    places[columns, rows] = positions
    return places.flatten()


def pack_symmetric(stack: Tensor, out: Tensor) -> None:
    """Write the upper triangles of a stack of symmetric matrices into a flat buffer.

    Args:
        stack: (k, n, n), symmetric; the strict lower triangles are not read.
        out: (k·n(n+1)/2,), contiguous; overwritten.
    """
    count, size, _ = stack.shape
    if size == 1:
        out.view(count, 1, 1).copy_(stack)
        return
    index = _triangle_index(size, stack.device)
    torch.index_select(stack.reshape(count, size * size), 1, index, out=out.view(count, index.numel()))


def unpack_symmetric(packed: Tensor, count: int, size: int) -> Tensor:
    """Rebuild the full symmetric matrices that `pack_symmetric` wrote.

    Args:
        packed: (count·size(size+1)/2,).
        count: Matrices in the stack.
        size: Rows of each matrix.

    Returns:
        New tensor (count, size, size).
    """
    if size == 1:
        return packed.reshape(count, 1, 1).clone()
    index = _mirror_index(size, packed.device)
    return torch.index_select(packed.view(count, -1), 1, index).view(count, size, size)


@dataclass(frozen=True)
class Part:
    """One named run of values in the segment of `rank`."""

    key: Hashable
    rank: int
    numel: int


class FlatBuffer:
    """One flat buffer: a segment a rank, in rank order; named parts in each segment, in the order given.

    A key may stand in several ranks' segments (a layer that several ranks own), once in each.

    Attributes:
        data: (total,), the whole buffer.
        counts: Values in each rank's segment.
        part_numels: Values in each part of each rank's segment, in the order in which they lie there.
    """

    def __init__(self, parts: Sequence[Part], num_ranks: int, storage: Tensor) -> None:
        """Lay the parts out over the front of `storage` (1-D; at least as long as all parts together)."""
        self.part_numels: list[list[int]] = [[] for _ in range(num_ranks)]
        for part in parts:
            self.part_numels[part.rank].append(part.numel)
        self.counts = [sum(numels) for numels in self.part_numels]
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        self.data = storage[: starts[-1]]
        self._segments = [self.data[start:end] for start, end in pairwise(starts)]
        self._views: dict[tuple[Hashable, int], Tensor] = {}
        self._ranks: dict[Hashable, list[int]] = {}
        position = starts[:-1]
        for part in parts:
            begin = position[part.rank]
            position[part.rank] = begin + part.numel
            assert (part.key, part.rank) not in self._views, f"{part.key} twice on rank {part.rank}"
            self._views[part.key, part.rank] = self.data[begin : begin + part.numel]
            self._ranks.setdefault(part.key, []).append(part.rank)

    def segment(self, rank: int) -> Tensor:
        """The rank's whole segment, a view of (counts[rank],)."""
        return self._segments[rank]

    def copies(self, key: Hashable) -> list[Tensor]:
        """Views of every copy of the part, in rank order."""
        return [self._views[key, rank] for rank in sorted(self._ranks[key])]

    def part(self, key: Hashable, rank: int) -> Tensor:
        """The rank's own copy of the part, a view."""
        return self._views[key, rank]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ranks

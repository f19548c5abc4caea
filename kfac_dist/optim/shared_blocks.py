"""Which rank owns which block, alike on every rank, and the buffers that are laid out by it."""

from collections.abc import Sequence

import torch

from kfac_dist.communicator import Communicator
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import block_cost
from kfac_dist.optim.buffers import StageBuffers


class SharedBlocks:
    """The blocks of a model, shared out over the ranks.

    Attributes:
        blocks: A block for each layer with parameters, in the model's order.
        owners: For each block the ranks that own it; without a communication all ranks decide the same.
        owned: The blocks that this rank owns, in the model's order.
        buffers: What travels between the ranks.
        updates: The buffer of stage 6.
    """

    def __init__(self, communicator: Communicator, dtype: torch.dtype, device: torch.device) -> None:
        """Start without blocks; see `share`.

        Args:
            communicator: The ranks.
            dtype: Of the buffers.
            device: Of the buffers.
        """
        self.blocks: list[Block] = []
        self.owners: list[tuple[int, ...]] = []
        self._rank, self._size = communicator.rank, communicator.size
        self._dtype, self._device = dtype, device

    def share(self, blocks: Sequence[Block]) -> None:
        """Give each block its owners and lay out the buffers.

        A block that is like the one of its name before is that one still, with its owners, so that its Fisher stays.
        """
        before = {block.name: (block, ranks) for block, ranks in zip(self.blocks, self.owners, strict=True)}
        kept = {n: before[b.name] for n, b in enumerate(blocks) if b.name in before and b.is_like(before[b.name][0])}
        self.blocks = [kept[number][0] if number in kept else block for number, block in enumerate(blocks)]
        costs = [block_cost(block) for block in self.blocks]
        self.owners = assign_owners(costs, self._size, {number: ranks for number, (_, ranks) in kept.items()})
        self._ranks_of = {block.name: ranks for block, ranks in zip(self.blocks, self.owners, strict=True)}
        self.owned = [block for block in self.blocks if self._rank in self._ranks_of[block.name]]
        self.buffers = StageBuffers(self.blocks, self.owners, self._size, self._dtype, self._device)
        self.updates = self.buffers.updates()

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """The owners of the block of this name."""
        return self._ranks_of[name]

    def is_first_owner(self, name: str) -> bool:
        """Whether this rank is the first of the owners: of several, one is to speak for the block."""
        return self._ranks_of[name][0] == self._rank

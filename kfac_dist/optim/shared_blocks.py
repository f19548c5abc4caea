"""Which rank owns which block, alike on every rank, and the buffers that are laid out by it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from kfac_dist.communicator import Communicator
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import block_cost
from kfac_dist.optim.agreement import DIGEST_LIMIT
from kfac_dist.optim.buffers import StageBuffers, read_update, update_shares
from kfac_dist.tensors.foreach import copy_all_


class SharedBlocks:
    """The blocks of a model, shared out over the ranks.

    Attributes:
        blocks: A block for each layer with parameters, in the model's order.
        owners: For each block the ranks that own it; without a communication all ranks decide the same.
        owned: The blocks that this rank owns, in the model's order.
        added: Blocks of which nothing is known from before.
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
        self._known: dict[str, tuple[Block, tuple[int, ...]]] = {}  # the newest of each name, frozen ones too
        self._rank, self._size = communicator.rank, communicator.size
        self._in_background = communicator.in_background
        self._dtype, self._device = dtype, device

    def share(self, blocks: Sequence[Block]) -> None:
        """Give each block its owners and lay out the buffers.

        A block that is like the last one of its name, which may have been frozen meanwhile, is that one still, with
        its owners, so that its Fisher stays.
        """
        before = self._known
        kept = {n: before[b.name] for n, b in enumerate(blocks) if b.name in before and b.is_like(before[b.name][0])}
        self.added = [block for number, block in enumerate(blocks) if number not in kept]
        self.blocks = [kept[number][0] if number in kept else block for number, block in enumerate(blocks)]
        costs = [block_cost(block) for block in self.blocks]
        self._lay_out(assign_owners(costs, self._size, {number: ranks for number, (_, ranks) in kept.items()}))

    def adopt(self, owners: Sequence[tuple[int, ...]]) -> None:
        """Take over the owners of another run, and forget the blocks that are frozen now."""
        self._known = {}
        self.added = []
        self._lay_out(owners)

    def _lay_out(self, owners: Sequence[tuple[int, ...]]) -> None:
        self.owners = list(owners)
        self._known |= {block.name: (block, ranks) for block, ranks in zip(self.blocks, owners, strict=True)}
        self._ranks_of = {block.name: ranks for block, ranks in zip(self.blocks, self.owners, strict=True)}
        self.owned = [block for block in self.blocks if self._rank in self._ranks_of[block.name]]
        self.buffers = StageBuffers(
            self.blocks, self.owners, self._size, self._dtype, self._device, self._in_background
        )
        self.updates = self.buffers.updates()

    @property
    def owned_gradients(self) -> list[Tensor]:
        """The averaged gradient of each block in `owned`, views of (num_values,)."""
        return [self.buffers.gradient(block.name, self._rank) for block in self.owned]

    @property
    def first_owned_gradients(self) -> list[Tensor]:
        """Those of the blocks of which this rank is the first owner."""
        named = zip(self.owned, self.owned_gradients, strict=True)
        return [gradient for block, gradient in named if self.is_first_owner(block.name)]

    def write_updates(self, directions: Iterable[tuple[Block, Tensor]]) -> None:
        """Put 𝒢 (num_values,) of blocks that this rank owns where stage 6 sends it from."""
        shares = [
            share
            for block, direction in directions
            for share in update_shares(self.updates, block, self._ranks_of[block.name], self._rank, direction)
        ]
        copy_all_([destination for destination, _ in shares], [values for _, values in shares])

    def read_updates(self) -> dict[int, Tensor]:
        """𝒢 of every parameter, by id, after stage 6."""
        return {
            id(parameter): direction
            for block in self.blocks
            for parameter, direction in zip(block.parameters, read_update(self.updates, block), strict=True)
        }

    @property
    def digest(self) -> int:
        """A number in [0, `DIGEST_LIMIT`) that differs, but for chance, where owners do."""
        return crc32(repr(self.owners).encode()) % DIGEST_LIMIT

    def state_dict(self) -> dict[str, Any]:
        """By block what it is of and who owns it; the same on every rank."""
        layers = {
            block.name: {**_describe(block), "owners": list(ranks)}
            for block, ranks in zip(self.blocks, self.owners, strict=True)
        }
        return {"num_ranks": self._size, "layers": layers}

    def owners_in(self, state: Mapping[str, Any]) -> list[tuple[int, ...]]:
        """Who is to own what when a state is loaded: as when it was saved, if by as many ranks. Changes nothing.

        Raises:
            ValueError: If the state's layers are not this model's, naming one.
        """
        saved = state["layers"]
        for block in self.blocks:
            here, there = _describe(block), dict(saved.get(block.name, {}))
            there.pop("owners", None)
            if here != there:
                found = f"{there} in the state" if there else "not in the state"
                raise ValueError(
                    f"the state does not fit the model: layer {block.name} is {here} here and {found}. Build the same "
                    "model, batchnorm form and skip, and freeze the same parameters before load_state_dict"
                )
        names = [block.name for block in self.blocks]
        extra = [name for name in saved if name not in names]
        if extra:
            raise ValueError(
                f"the state does not fit the model: layer {extra[0]} is in the state and not trained here. Build the "
                "same model, and freeze the same parameters before load_state_dict"
            )
        if state["num_ranks"] != self._size:
            return self.owners
        return [tuple(saved[name]["owners"]) for name in names]

    def is_first_owner(self, name: str) -> bool:
        """Whether this rank is the first of the owners: of several, one is to speak for the block."""
        return self._ranks_of[name][0] == self._rank


def _describe(block: Block) -> dict[str, Any]:
    return {
        "form": block.form,
        "matrices": {matrix: list(shape) for matrix, shape in block.factor_shapes.items()},
        "parameters": [list(parameter.shape) for parameter in block.parameters],
    }

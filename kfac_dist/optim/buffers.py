"""The flat buffers that travel in stages 3 and 6, and what lies where in them. Lays out and copies; sends nothing."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.optim.gradient_messages import Message, cut_for_backward
from kfac_dist.tensors.foreach import in_order_of
from kfac_dist.tensors.packing import FlatBuffer, Part, triangle_numel


class StageBuffers:
    """The buffers, allocated once at the size of a full refresh.

    Stage 3 carries, for each owner, its blocks' packed matrices that are due, and in buffers of their own their
    gradients, which travel beside the backward pass where collectives can, or while the matrices are factorised; stage
    6 the preconditioned gradients. Where several ranks own a block each of them contributes an equal share of stage 6.

    Attributes:
        messages: Stage 3's gradients, in the order in which a backward pass completes them; keys are block names.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        owners: Sequence[tuple[int, ...]],
        num_ranks: int,
        dtype: torch.dtype,
        device: torch.device,
        in_background: bool = False,
    ) -> None:
        self._blocks = list(zip(blocks, owners, strict=True))
        self._num_ranks = num_ranks

        def storage(parts: Sequence[Part]) -> Tensor:
            return torch.zeros(sum(part.numel for part in parts), dtype=dtype, device=device)

        self._factors_storage = storage(self._factors_parts(all_factor_keys(blocks)))
        self._updates_storage = storage(self._updates_parts())
        self.messages: list[Message] = []
        self._message_of: dict[str, FlatBuffer] = {}
        num_bytes = [block.num_values * dtype.itemsize for block in blocks]
        for numbers in cut_for_backward(num_bytes, num_ranks, in_background):
            members = [self._blocks[number] for number in numbers]
            parts = [Part(block.name, rank, block.num_values) for block, ranks in members for rank in ranks]
            buffer = FlatBuffer(parts, num_ranks, storage(parts))
            views = [
                (parameter, view)
                for block, _ in members
                for copy in buffer.copies(block.name)
                for parameter, view in zip(block.parameters, parameter_views(copy, block), strict=True)
            ]
            self.messages.append(Message(buffer, views))
            self._message_of |= {block.name: buffer for block, _ in members}

    def fill_gradients(self) -> None:
        """Write this rank's gradients, zeros where there is none, into all messages."""
        for message in self.messages:
            message.fill()

    def gradient(self, name: str, rank: int) -> Tensor:
        """The gradient of the block of this name in the segment of one of its owners, a view of (num_values,)."""
        return self._message_of[name].part(name, rank)

    def factors(self, due: Sequence[FactorKey]) -> FlatBuffer:
        """Stage 3's buffer of the factors when these are due; they are the keys."""
        return FlatBuffer(self._factors_parts(due), self._num_ranks, self._factors_storage)

    def updates(self) -> FlatBuffer:
        """The buffer of stage 6; keys are block names."""
        return FlatBuffer(self._updates_parts(), self._num_ranks, self._updates_storage)

    def _factors_parts(self, due: Iterable[FactorKey]) -> list[Part]:
        due = set(due)
        parts = []
        for block, ranks in self._blocks:
            numels = {
                (block.name, matrix): count * triangle_numel(size)
                for matrix, (count, size) in block.factor_shapes.items()
                if (block.name, matrix) in due
            }
            parts += [Part(key, rank, numel) for rank in ranks for key, numel in numels.items()]
        return parts

    def _updates_parts(self) -> list[Part]:
        return [
            Part(block.name, rank, end - begin)
            for block, ranks in self._blocks
            for rank, begin, end in _equal_shares(ranks, block.num_values)
        ]


def update_shares(
    updates: FlatBuffer, block: Block, ranks: Sequence[int], rank: int, direction: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a block's 𝒢 (num_values,): its place in the buffer of stage 6, and what belongs there."""
    for owner, begin, end in _equal_shares(ranks, block.num_values):
        if owner == rank:
            yield updates.part(block.name, rank), direction[begin:end]


def read_update(updates: FlatBuffer, block: Block) -> list[Tensor]:
    """𝒢 of each of the block's parameters; views of the gathered buffer where one rank owns the block."""
    pieces = updates.copies(block.name)
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    views = zip(block.parameters, parameter_views(flat, block), strict=True)
    return [in_order_of(p, view.to(p.dtype)) for p, view in views]  # so that one foreach update can take them all


def all_factor_keys(blocks: Iterable[Block]) -> list[FactorKey]:
    """Keys of all matrices of all blocks."""
    return [(block.name, matrix) for block in blocks for matrix in block.factor_shapes]


def parameter_views(flat: Tensor, block: Block) -> Iterator[Tensor]:
    """Cut a block's flat values (num_values,) into views of its parameters' shapes."""
    parts = flat.split([parameter.numel() for parameter in block.parameters])
    return (part.view(parameter.shape) for part, parameter in zip(parts, block.parameters, strict=True))


def add_weight_decay(block: Block, weight_decays: Sequence[float], gradient: Tensor) -> None:
    """Add weight_decay · w to a flat gradient (num_values,); one weight decay for each parameter."""
    views = parameter_views(gradient, block)
    for parameter, view, weight_decay in zip(block.parameters, views, weight_decays, strict=True):
        if weight_decay:
            view.add_(parameter, alpha=weight_decay)


def _equal_shares(ranks: Sequence[int], numel: int) -> list[tuple[int, int, int]]:
    """Cut `numel` values among the owners, as (rank, begin, end)."""
    cuts = [numel * number // len(ranks) for number in range(len(ranks) + 1)]
    return [(rank, cuts[number], cuts[number + 1]) for number, rank in enumerate(ranks)]

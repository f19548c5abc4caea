"""The work of a training iteration on one rank, stage by stage, as the program's own code does it on any device."""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.curvature.blocks.base import Block, FactorKey
from kfac_dist.curvature.inversion import MIN_INTERVAL_FOR_INVERSE
from kfac_dist.curvature.owned import OwnedFisher
from kfac_dist.optim.buffers import StageBuffers
from kfac_dist.optim.update import momentum_update_, rescale_weights_, rescaled_weights
from kfac_dist.planning.operations import Operation, operations_of
from kfac_dist.tensors.packing import pack_symmetric, triangle_numel, unpack_symmetric
from kfac_dist.vocabulary import WeightRescaling

_META = torch.device("meta")
_DEFERRED = torch.device("cuda")  # nobody asks tensors without values whether a factorisation failed


@dataclass(frozen=True)
class SlotWork:
    """Operations of one slot, that is of one forward and backward.

    Attributes:
        forward: Of stage 1.
        backward: Of stage 2 without factors.
        factors: By the matrix's name ("A", "G" or "F"), of all layers.
        further_factors: The same in a slot that is not an iteration's first, and so adds to what is there.
        activation_values: Values that autograd keeps from forward to backward.
    """

    forward: list[Operation]
    backward: list[Operation]
    factors: dict[str, list[Operation]]
    further_factors: dict[str, list[Operation]]
    activation_values: int


def slot_work(
    model: nn.Module,
    blocks: Sequence[Block],
    image_shape: tuple[int, int, int],
    num_classes: int,
    images: int,
    sample_fraction: float = 1.0,
) -> SlotWork:
    """Run a slot on tensors without values.

    Args:
        model: On the meta device, in training mode.
        blocks: Of the model.
        image_shape: (channels, height, width).
        num_classes: Outputs of the model.
        images: Of the slot.
        sample_fraction: Of the images, that A and G are computed from.
    """
    layout = torch.channels_last  # as the trainer has it on a GPU; a CPU's copies are of the same size
    batch = torch.empty(images, *image_shape, device=_META).to(memory_format=layout)
    model.to(memory_format=layout)
    labels = torch.zeros(images, dtype=torch.int64, device=_META)
    calls: list[tuple[Block, Tensor, Tensor]] = []
    handles = [
        block.module.register_forward_hook(_CallRecorder(block, calls), with_kwargs=True)
        for block in blocks
        if block.factor_shapes
    ]
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    losses: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = operations_of(lambda: losses.append(F.cross_entropy(model(batch), labels)))
    backward = operations_of(losses.pop().backward)
    for handle in handles:
        handle.remove()
    factors: dict[str, list[Operation]] = {}
    further: dict[str, list[Operation]] = {}
    for block, x, g in calls:
        for matrix, (count, size) in block.factor_shapes.items():
            packed = torch.empty(count * triangle_numel(size), device=_META)
            pack_symmetric(torch.empty(count, size, size, device=_META), packed)  # makes the index once, before
            operations = operations_of(_Factor(block, matrix, x, g, sample_fraction, packed))
            factors.setdefault(matrix, []).extend(operations)
            addition = operations_of(lambda packed=packed: packed.add_(packed))  # type: ignore[misc]
            further.setdefault(matrix, []).extend([*operations, *addition])
    return SlotWork(forward, backward, factors, further, sum(kept.values()))


@dataclass(frozen=True)
class _CallRecorder:
    """A forward hook that notes a layer's input and the gradient at its output."""

    block: Block
    calls: list[tuple[Block, Tensor, Tensor]]

    def __call__(self, module: nn.Module, inputs: Sequence[Tensor], keywords: Mapping[str, Tensor], y: Tensor) -> None:
        x = (inputs[0] if inputs else keywords["input"]).detach()
        y.register_hook(lambda g: self.calls.append((self.block, x, g)))


@dataclass(frozen=True)
class _Factor:
    """Builds a matrix of one call of a layer, and packs it."""

    block: Block
    matrix: str
    x: Tensor
    g: Tensor
    sample_fraction: float
    packed: Tensor

    def __call__(self) -> None:
        self.block.pack_sampled_factor(self.matrix, self.x, self.g, None, self.sample_fraction, self.packed)


@dataclass(frozen=True)
class Refresh:
    """What an iteration does with each kind of matrix.

    Attributes:
        due: Names of the matrices that it refreshes.
        served: Names of those whose last refresh was to serve more than one iteration, and how many; from the number
            on where all are inverted, that number.
    """

    due: frozenset[str]
    served: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, due: Iterable[str], served: Mapping[str, int]) -> Self:
        """Of an iteration that refreshes these matrices, and the iterations that each one's last refresh serves."""
        longer = {
            matrix: min(interval, MIN_INTERVAL_FOR_INVERSE) for matrix, interval in served.items() if interval > 1
        }
        return cls(frozenset(due), frozenset(longer.items()))

    def interval(self, matrix: str) -> int:
        """Iterations that a matrix's last refresh serves."""
        return dict(self.served).get(matrix, 1)


@dataclass(frozen=True)
class OwnedWork:
    """Operations of stages 4 and 5 for the blocks of one rank."""

    inverse: list[Operation]
    precondition: list[Operation]


class OwnedWorks:
    """Stages 4 and 5 of any owner; blocks of the same shapes are looked at once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, OwnedWork] = {}

    def of(self, blocks: Sequence[Block], refresh: Refresh) -> OwnedWork:
        """What the owner of these blocks does in such an iteration."""
        shapes = tuple((block.form, tuple(block.factor_shapes.items()), block.num_values) for block in blocks)
        if (shapes, refresh) not in self._known:
            self._known[shapes, refresh] = _owned_work(blocks, refresh)
        return self._known[shapes, refresh]


def _owned_work(blocks: Sequence[Block], refresh: Refresh) -> OwnedWork:
    stacks = {(block.name, matrix): stack for block in blocks for matrix, stack in block.factor_shapes.items()}
    packed = {key: torch.empty(count * triangle_numel(size), device=_META) for key, (count, size) in stacks.items()}
    for key, stack in stacks.items():
        unpack_symmetric(packed[key], *stack)  # makes the index once, before
    inverse: list[Operation] = []
    owned = _owned_fisher(blocks)
    if any(matrix in refresh.due for _, matrix in stacks):
        for (name, matrix), (count, size) in stacks.items():
            owned[name].averages[matrix].update(torch.empty(count, size, size, device=_META), None)
        found = operations_of(lambda: _refresh(owned, packed, stacks, refresh, refresh.due))
        # Stage 4 solves for nothing but inverses, and those by routines that know the identity where there are some.
        inverse = [
            item._replace(kind="invert", flops=item.flops / 3) if item.kind == "solve" else item for item in found
        ]
        owned = _owned_fisher(blocks)
    _refresh(owned, packed, stacks, refresh, {"A", "G", "F"})
    gradients = [torch.empty(block.num_values, device=_META) for block in blocks]
    if not refresh.due:  # inverses of one shape lie behind one another since the first iteration after the refresh
        list(owned.precondition(gradients))
    return OwnedWork(inverse, operations_of(lambda: list(owned.precondition(gradients))))


def _owned_fisher(blocks: Sequence[Block]) -> OwnedFisher:
    owned = OwnedFisher(None, _DEFERRED)
    owned.follow(blocks)
    return owned


def _refresh(
    owned: OwnedFisher,
    packed: Mapping[FactorKey, Tensor],
    stacks: Mapping[FactorKey, tuple[int, int]],
    refresh: Refresh,
    due: Collection[str],
) -> None:
    """Stage 4 for these matrices, as `DistributedFisher.refresh` has it."""
    factors = {key: unpack_symmetric(packed[key], *stack) for key, stack in stacks.items() if key[1] in due}
    if factors:
        owned.refresh(
            factors,
            lambda block: 1.0,
            lambda key: refresh.interval(key[1]),
        )


def copy_work(buffers: StageBuffers) -> list[Operation]:
    """Operations that put the gradients, which must be there, into the buffer of stage 3."""
    return operations_of(buffers.fill_gradients)


def update_work(model: nn.Module, rescaling: WeightRescaling) -> list[Operation]:
    """Operations of stage 6 after the gathering (Eq. 17 and 18)."""
    weights: list[Tensor] = list(model.parameters())
    directions, velocities = ([torch.empty_like(weight) for weight in weights] for _ in range(2))
    rescaled = list(rescaled_weights(model))

    @torch.no_grad()
    def update() -> None:
        momentum_update_(weights, directions, velocities, 0.1, 0.9)
        rescale_weights_(rescaled, rescaling, [torch.empty_like(weight) for weight in rescaled])

    return operations_of(update)

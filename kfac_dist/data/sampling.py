"""Which samples an iteration trains on: one endless stream, cut into global batches and slots.

Sample i of the stream belongs to epoch i // N and is entry i % N of that epoch's permutation of the N
training images. Iteration t takes the B samples from t*B on, so nothing is dropped at the end of an epoch and
B may exceed N. The B samples are cut into slots of equal size; ranks take whole slots, so who computes what
does not change the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from kfac_dist.data.random_streams import RandomStream, keyed_generator


@dataclass(frozen=True)
class SlotSampler:
    """Samples of each slot of each iteration.

    Attributes:
        num_samples: N, training images, > 0.
        per_slot: Samples of one slot, > 0.
        slots_per_iteration: Slots of one global batch, over all ranks, > 0.
        seed: The run's seed, >= 0.
    """

    num_samples: int
    per_slot: int
    slots_per_iteration: int
    seed: int

    @property
    def global_size(self) -> int:
        """B, samples of one iteration."""
        return self.per_slot * self.slots_per_iteration

    def num_iterations(self, epochs: float) -> int:
        """Iterations that cover a number of epochs, possibly fractional: ceil(epochs * N / B)."""
        # The decimal that the user wrote, not its binary neighbour: 1.1 epochs of 100 samples are 110, not
        # 110.00000001.
        return math.ceil(Fraction(repr(float(epochs))) * self.num_samples / self.global_size)

    def epoch_at(self, iteration: int) -> float:
        """Fractional epoch at the start of an iteration: t * B / N."""
        return iteration * self.global_size / self.num_samples

    def local_slots(self, rank: int, num_ranks: int) -> range:
        """Slots of a global batch that a rank works on: rank, rank + num_ranks and so on."""
        return range(rank, self.slots_per_iteration, num_ranks)

    def slots(self, rank: int, num_ranks: int, first: int, last: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """A rank's slots of some iterations: iteration, slot and `indices` each, in the order of training.

        Args:
            rank: In [0, num_ranks).
            num_ranks: Ranks that share each iteration.
            first: Iteration to begin with, >= 0.
            last: Iteration to end before.
        """
        for iteration in range(first, last):
            for slot in self.local_slots(rank, num_ranks):
                yield iteration, slot, self.indices(iteration, slot)

    def indices(self, iteration: int, slot: int) -> np.ndarray:
        """Training images of one slot.

        Args:
            iteration: >= 0.
            slot: In [0, slots_per_iteration).

        Returns:
            (per_slot,) int64, each in [0, num_samples).
        """
        first = iteration * self.global_size + slot * self.per_slot
        last = first + self.per_slot
        pieces = []
        for epoch in range(first // self.num_samples, (last - 1) // self.num_samples + 1):
            start = epoch * self.num_samples
            order = _epoch_order(self.num_samples, epoch, self.seed)
            pieces.append(order[max(first - start, 0) : last - start])
        return np.concatenate(pieces)


# A rank walks through the stream in order, and at most two epochs meet in a slot (one where the slot is the
# longer): four permutations are always enough to draw each of them once.
@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, epoch: int, seed: int) -> np.ndarray:
    order = keyed_generator(seed, RandomStream.ORDER, epoch).permutation(num_samples)
    order.setflags(write=False)
    return order

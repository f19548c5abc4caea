"""All randomness of a run, keyed by (seed, stream, place): the same on any number of ranks and any device."""

from enum import IntEnum

import numpy as np


class RandomStream(IntEnum):
    """What random numbers are drawn for; part of the key, so no two uses share a stream."""

    ORDER = 1
    CROP_FLIP = 2
    MIXUP = 3
    ERASING = 4
    TORCH = 5


def keyed_generator(seed: int, purpose: RandomStream, *place: int) -> np.random.Generator:
    """Generator for one use at one place of a run.

    Args:
        seed: The run's seed, >= 0.
        purpose: What the numbers are for.
        place: Where in the run: (epoch,) or (iteration, slot), each >= 0.
    """
    return np.random.default_rng([seed, int(purpose), *place])

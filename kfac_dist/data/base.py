"""What the trainer asks of a data set, wherever its images come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from kfac_dist.data.sampling import SlotSampler


@dataclass(frozen=True)
class Original:
    """A training image before any augmentation.

    Attributes:
        pixels: (H, W, C) uint8.
        outline: (top, left, height, width) of what is cut out of it, in its pixels; None where nothing is.
    """

    pixels: np.ndarray
    outline: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Batch:
    """A slot's images and labels.

    Attributes:
        iteration: Iteration of the run, >= 0.
        slot: Slot of the global batch, >= 0.
        images: (N, C, H, W), normalised.
        labels: Class indices, (N,) int64; after `Augmentation`, shares of the classes, (N, num_classes).
    """

    iteration: int
    slot: int
    images: Tensor
    labels: Tensor


class Dataset(Protocol):
    """Training and evaluation batches on the training device, the same for a slot on any number of ranks."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class."""

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs in the images."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the batches."""

    @property
    def num_train(self) -> int:
        """Number of training images."""

    @property
    def num_eval(self) -> int:
        """Number of evaluation images."""

    @property
    def digest(self) -> str:
        """Of labels and bytes that lie in memory, in their order; empty where there are none to compare."""

    @property
    def reads_files(self) -> bool:
        """Whether batches are read from files while training, so that one may turn out to be damaged."""

    def train_batches(
        self, sampler: SlotSampler, rank: int, num_ranks: int, first_iteration: int, last_iteration: int
    ) -> Iterator[Batch]:
        """This rank's slots, one after the other, iteration by iteration.

        Args:
            sampler: Which images make a slot; its `num_samples` is this data set's `num_train`.
            rank: In [0, num_ranks).
            num_ranks: Ranks that share each iteration.
            first_iteration: Where to begin, >= 0.
            last_iteration: Where to end, exclusive.

        Yields:
            Batches of per_slot images, cropped and flipped, with class indices.
        """

    def eval_batches(self, rank: int, num_ranks: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation images; over all ranks each image comes exactly once.

        Shares differ by at most one image and are empty for some ranks where there are more ranks than
        images.

        Args:
            rank: In [0, num_ranks).
            num_ranks: Ranks that share the evaluation.
            batch_size: Most images of a batch, > 0; the last batch may be smaller.

        Yields:
            Images (n, C, H, W), normalised, and class indices (n,) int64, n >= 1.
        """

    def take_skipped(self) -> list[str]:
        """Files left out as damaged since the last call; only where the configuration allows it."""

    def originals(self, sampler: SlotSampler, iteration: int, slot: int, limit: int) -> list[Original]:
        """The first images of a slot as they are stored, at most `limit`, to look at."""

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images, (N, C, H, W), as values in [0, 1] to look at."""


def share(num_images: int, rank: int, num_ranks: int) -> range:
    """A rank's images of an evaluation: contiguous, sizes differing by at most one, all ranks covering all."""
    return range(num_images * rank // num_ranks, num_images * (rank + 1) // num_ranks)

"""Images made up on the training device: they measure a step without input, at any shape.

An image is its class's colour plus one of a few noise patterns, both drawn once. So a network can learn them,
and an image is the same in every epoch and on any number of ranks (CPU and GPU draw different ones).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kfac_dist.data.base import Batch, Original, share
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.tensors.host_copy import to_device

_NUM_PATTERNS = 61  # prime: classes and patterns come in all combinations


class SyntheticDataset:
    """Noise in the colours of its class.

    Args:
        shape: (channels, height, width).
        num_classes: > 0; image i is of class i % num_classes.
        num_train: Training images, > 0.
        num_eval: Evaluation images, > 0.
        device: Where the images are made.
        dtype: Their floating type.
        seed: The run's seed, >= 0.
    """

    reads_files = False
    digest = ""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        num_train: int,
        num_eval: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.image_shape = shape
        self.num_classes = num_classes
        self.num_train = num_train
        self.num_eval = num_eval
        self.class_names = tuple(f"class {label}" for label in range(num_classes))
        self._device = device
        generator = torch.Generator(device).manual_seed(seed)
        self._patterns = torch.randn(_NUM_PATTERNS, *shape, generator=generator, device=device).to(dtype)
        self._colours = torch.randn(num_classes, shape[0], 1, 1, generator=generator, device=device).to(dtype)

    def train_batches(
        self, sampler: SlotSampler, rank: int, num_ranks: int, first_iteration: int, last_iteration: int
    ) -> Iterator[Batch]:
        """This rank's slots; see `Dataset.train_batches`."""
        for iteration, slot, indices in sampler.slots(rank, num_ranks, first_iteration, last_iteration):
            yield Batch(iteration, slot, *self._images(indices))

    def eval_batches(self, rank: int, num_ranks: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation images; see `Dataset.eval_batches`."""
        mine = share(self.num_eval, rank, num_ranks)
        for start in range(0, len(mine), batch_size):
            yield self._images(self.num_train + np.array(mine[start : start + batch_size]))

    def take_skipped(self) -> list[str]:
        """Nothing can be damaged."""
        return []

    def originals(self, sampler: SlotSampler, iteration: int, slot: int, limit: int) -> list[Original]:
        """The images as bytes; see `Dataset.originals`."""
        images, _ = self._images(sampler.indices(iteration, slot)[:limit])
        pixels = (255 * self.to_pixels(images)).round().byte()
        return [Original(image, None) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def to_pixels(self, images: Tensor) -> Tensor:
        """Three standard deviations around zero as [0, 1]."""
        return (images / 6 + 0.5).clamp(0, 1)

    def _images(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        index = to_device(torch.from_numpy(indices), self._device)
        labels = index % self.num_classes
        return self._patterns[index % _NUM_PATTERNS] + self._colours[labels], labels

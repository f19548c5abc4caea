"""Data sets held in memory as uint8 on the training device, normalised and augmented by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kfac_dist.data.augment import CropFlip
from kfac_dist.data.base import Batch, Original, share
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.tensors.host_copy import to_device


@dataclass(frozen=True)
class ImageArrays:
    """What a reader returns.

    Attributes:
        train_images: (N, C, H, W) uint8. The range of the values does not matter: batches are standardised.
        train_labels: (N,) int64 in [0, len(class_names)).
        eval_images: Like `train_images`.
        eval_labels: Like `train_labels`.
        class_names: One for each class.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray
    class_names: tuple[str, ...]


class InMemoryDataset:
    """Training and evaluation images on the training device.

    Batches are normalised by the mean and standard deviation of each channel of the training images.

    Args:
        arrays: Images and labels.
        crop_flip: Augmentation of training batches.
        device: Where the data are held and batches are made.
        dtype: Floating type of the batches.
    """

    reads_files = False

    def __init__(self, arrays: ImageArrays, crop_flip: CropFlip, device: torch.device, dtype: torch.dtype) -> None:
        self.class_names = arrays.class_names
        self.crop_flip = crop_flip
        self.dtype = dtype
        self.train_images = torch.from_numpy(arrays.train_images).to(device)
        self.train_labels = torch.from_numpy(arrays.train_labels).to(device)
        self.eval_images = torch.from_numpy(arrays.eval_images).to(device)
        self.eval_labels = torch.from_numpy(arrays.eval_labels).to(device)
        mean, deviation = channel_statistics(arrays.train_images)
        self._mean = torch.from_numpy(mean)[:, None, None].to(device, dtype)
        self._deviation = torch.from_numpy(deviation)[:, None, None].to(device, dtype)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs in the images."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    @property
    def num_eval(self) -> int:
        """Number of evaluation images."""
        return len(self.eval_images)

    def train_batches(
        self, sampler: SlotSampler, rank: int, num_ranks: int, first_iteration: int, last_iteration: int
    ) -> Iterator[Batch]:
        """This rank's slots, normalised and augmented; see `Dataset.train_batches`."""
        for iteration, slot, indices in sampler.slots(rank, num_ranks, first_iteration, last_iteration):
            index = to_device(torch.from_numpy(indices), self.train_images.device)
            images = self.crop_flip.apply(self._normalise(self.train_images[index]), iteration, slot)
            yield Batch(iteration, slot, images, self.train_labels[index])

    def eval_batches(self, rank: int, num_ranks: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the evaluation images; see `Dataset.eval_batches`."""
        mine = share(self.num_eval, rank, num_ranks)
        for start in range(mine.start, mine.stop, batch_size):
            stop = min(start + batch_size, mine.stop)
            yield self._normalise(self.eval_images[start:stop]), self.eval_labels[start:stop]

    def take_skipped(self) -> list[str]:
        """Readers refuse damaged files, so nothing is left out."""
        return []

    def originals(self, sampler: SlotSampler, iteration: int, slot: int, limit: int) -> list[Original]:
        """Images as they are stored, the brightest value as 255; see `Dataset.originals`."""
        indices = torch.from_numpy(sampler.indices(iteration, slot)[:limit])
        images = self.train_images[indices.to(self.train_images.device)].double()
        pixels = (images * (255 / int(self.train_images.max()))).round().byte()
        return [Original(image, None) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation, the brightest value as 1; see `Dataset.to_pixels`."""
        return ((images * self._deviation + self._mean) / int(self.train_images.max())).clamp(0, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.dtype) - self._mean) / self._deviation


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all images and pixels.

    Args:
        images: (N, C, H, W) uint8.

    Returns:
        Two (C,) float64 arrays. The deviation of a constant channel is given as 1, so that it can be divided
        by.
    """
    values = np.arange(256.0)
    # 256 counts a channel instead of a float64 copy of all pixels: exact, and small for any data set.
    counts = np.stack([np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(images.shape[1])])
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean, np.where(deviation > 0, deviation, 1.0)

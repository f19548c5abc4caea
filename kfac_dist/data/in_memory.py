"""Data sets held in memory as they are stored, on the training device; normalised and augmented by batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kfac_dist.data.augment import CropFlip
from kfac_dist.data.base import Batch, Original, share
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError
from kfac_dist.tensors.host_copy import to_device

_IMAGE_DTYPES = ("uint8", "float16", "float32", "float64")


@dataclass(frozen=True)
class ImageArrays:
    """What a reader returns, or one's own images.

    Attributes:
        train_images: (N, C, H, W) uint8 or floating. The range of the values does not matter: batches are
            standardised.
        train_labels: (N,) integers in [0, len(class_names)).
        eval_images: Like `train_images`: the same C, H, W, type and range.
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

    Raises:
        InputError: If the arrays are not what `ImageArrays` says; the message names the array, the rule and the value.
    """

    reads_files = False

    def __init__(self, arrays: ImageArrays, crop_flip: CropFlip, device: torch.device, dtype: torch.dtype) -> None:
        check_arrays(arrays)
        self.digest = _digest(arrays)
        self.class_names = arrays.class_names
        self.crop_flip = crop_flip
        self.dtype = dtype
        self.train_images = _tensor(arrays.train_images).to(device)
        self.train_labels = _tensor(arrays.train_labels.astype(np.int64)).to(device)
        self.eval_images = _tensor(arrays.eval_images).to(device)
        self.eval_labels = _tensor(arrays.eval_labels.astype(np.int64)).to(device)
        self._black = min(0.0, float(arrays.train_images.min()))
        self._white = float(arrays.train_images.max())
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
        """Images as they are stored, the brightest value as 255, and their crop; see `Dataset.originals`."""
        indices = sampler.indices(iteration, slot)
        index = torch.from_numpy(indices[:limit]).to(self.train_images.device)
        pixels = (255 * self._in_unit_range(self.train_images[index].double())).round().byte()
        pixels = pixels.permute(0, 2, 3, 1).cpu()
        outlines: list[tuple[float, float, float, float] | None] = [None] * len(pixels)
        if self.crop_flip.padding:
            _, height, width = self.image_shape
            corners = self.crop_flip.corners(len(indices), height, width, iteration, slot)[:limit]
            outlines = [(top, left, height, width) for top, left in corners.tolist()]
        return [Original(image.numpy(), outline) for image, outline in zip(pixels, outlines, strict=True)]

    def to_pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation, the brightest value as 1; see `Dataset.to_pixels`."""
        return self._in_unit_range(images * self._deviation + self._mean)

    def _in_unit_range(self, values: Tensor) -> Tensor:
        """Zero (or the lowest value, where that is negative) as 0, the brightest value as 1."""
        return ((values - self._black) / ((self._white - self._black) or 1.0)).clamp(0, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.dtype) - self._mean) / self._deviation


def downsample(arrays: ImageArrays, factor: int) -> ImageArrays:
    """Images whose pixels are the means of squares of the given ones, rounded where they are integers.

    Args:
        arrays: Images whose height and width the factor divides.
        factor: Side of a square in pixels; 1 changes nothing.
    """
    if factor == 1:
        return arrays
    return replace(
        arrays,
        train_images=_means_of_squares(arrays.train_images, factor),
        eval_images=_means_of_squares(arrays.eval_images, factor),
    )


def _means_of_squares(images: np.ndarray, factor: int) -> np.ndarray:
    number, channels, height, width = images.shape
    squares = images.reshape(number, channels, height // factor, factor, width // factor, factor)
    means = squares.mean(axis=(3, 5), dtype=np.float32 if images.dtype == np.uint8 else images.dtype)
    rounded: np.ndarray = means.round() if images.dtype == np.uint8 else means
    return rounded.astype(images.dtype)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all images and pixels.

    Args:
        images: (N, C, H, W) uint8 or floating.

    Returns:
        Two (C,) float64 arrays. The deviation of a constant channel is given as 1, so that it can be divided
        by.
    """
    statistics = [_statistics(images[:, channel]) for channel in range(images.shape[1])]
    mean, deviation = np.array(statistics).T
    return mean, deviation


def _statistics(channel: np.ndarray) -> tuple[float, float]:
    if channel.dtype != np.uint8:
        # A constant channel by its values: its computed deviation may be a rounding error instead of zero.
        is_constant = channel.min() == channel.max()
        mean = channel.mean(dtype=np.float64)
        return float(mean), 1.0 if is_constant else float(channel.std(dtype=np.float64))
    values = np.arange(256.0)
    # 256 counts instead of a float64 copy of all pixels: exact, and small for any data set.
    counts = np.bincount(channel.ravel(), minlength=256)
    shares = counts / counts.sum()
    mean = shares @ values
    return float(mean), float(np.sqrt(shares @ (values - mean) ** 2)) or 1.0


def _tensor(array: np.ndarray) -> Tensor:
    """The array's own memory where PyTorch can use it, else a copy."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _digest(arrays: ImageArrays) -> str:
    """Of labels and images; but not of floating images, which hosts may compute with other roundings."""
    digest = 0
    for array in (arrays.train_images, arrays.eval_images):
        if array.dtype == np.uint8:
            digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
    for array in (arrays.train_labels, arrays.eval_labels):
        digest = zlib.crc32(np.ascontiguousarray(array, np.int64).data, digest)
    return f"{digest:08x}"


def check_arrays(arrays: ImageArrays) -> None:
    """Refuse arrays that are not what `ImageArrays` says.

    Raises:
        InputError: Naming the array, the rule and the value.
    """
    names = arrays.class_names
    if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"class_names must be a tuple of one text for each class, got {names!r:.80}")
    for split in ("train", "eval"):
        images, labels = getattr(arrays, f"{split}_images"), getattr(arrays, f"{split}_labels")
        _check_images(f"{split}_images", images)
        _check_labels(f"{split}_labels", labels, len(arrays.class_names))
        if len(images) != len(labels):
            raise InputError(
                f"{split}_labels must hold one label for each of the {len(images)} {split}_images, got {len(labels)}"
            )
    for what, train, evaluation in (
        ("shape", arrays.train_images.shape[1:], arrays.eval_images.shape[1:]),
        ("type", arrays.train_images.dtype, arrays.eval_images.dtype),
    ):
        if train != evaluation:
            raise InputError(
                f"eval_images must have the {what} of train_images, {train}, got {evaluation}: prepare both alike"
            )


def _check_images(name: str, images: np.ndarray) -> None:
    dtype = _dtype_of(name, images)
    if dtype not in _IMAGE_DTYPES:
        raise InputError(f"{name} must be of type {', '.join(_IMAGE_DTYPES)}, got {dtype}: convert with .astype")
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{name} must be of shape (images, channels, height, width), none zero, got {images.shape}")
    if images.shape[3] in (1, 3) and images.shape[1] == images.shape[2] not in (1, 3):
        raise InputError(
            f"{name} must be of shape (images, channels, height, width), got {images.shape}, which looks like "
            "channels last: reorder with .transpose(0, 3, 1, 2)"
        )
    if dtype != "uint8":
        finite = np.isfinite(images)
        if not finite.all():
            place = tuple(int(number) for number in np.argwhere(~finite)[0])
            raise InputError(f"{name} must be finite, got {images[place]} at {place}: replace or leave out such images")


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    dtype = _dtype_of(name, labels)
    if not np.issubdtype(labels.dtype, np.integer) or not labels.dtype.isnative:
        raise InputError(f"{name} must be class indices of an integer type, got {dtype}: convert with .astype(int)")
    if labels.ndim != 1:
        raise InputError(f"{name} must be of shape (images,), one class index each, got {labels.shape}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise InputError(
            f"{name} must be in [0, {num_classes}), the number of class_names, got {labels[wrong[0]]} at {wrong[0]}"
            f" ({len(wrong)} such labels): count classes from 0 and name each in class_names"
        )


def _dtype_of(name: str, array: object) -> str:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} must be a NumPy array, got {type(array).__name__}: convert with np.asarray")
    return str(array.dtype)

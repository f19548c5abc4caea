"""Random augmentation of a slot's batch, on the training device and without a loop over images.

Every draw comes from a NumPy generator keyed by (seed, purpose, iteration, slot) and is made on the host, so
a slot is augmented alike on any number of ranks and any device. Images reach these functions normalised:
zeros are the mean colour of the training set, which is what padding and erasing write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kfac_dist.config.schema import AugmentConfig
from kfac_dist.data.base import Batch
from kfac_dist.data.random_streams import RandomStream, keyed_generator
from kfac_dist.errors import InputError
from kfac_dist.tensors.host_copy import to_device


def soft_labels(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Class indices, (N,) int64, as one-hot rows, (N, num_classes) of `dtype`."""
    return torch.nn.functional.one_hot(labels, num_classes).to(dtype)


@dataclass(frozen=True)
class CropFlip:
    """Zero padding followed by a random crop of the original size, and a random horizontal flip.

    Attributes:
        padding: Pixels added on each side before the crop, >= 0; 0 leaves the position alone.
        flip: Whether an image is mirrored left to right with probability one half.
        seed: The run's seed, >= 0.
    """

    padding: int
    flip: bool
    seed: int

    def pixels(self, num_images: int, height: int, width: int, iteration: int, slot: int) -> np.ndarray:
        """Source row and column of every output row and column.

        Returns:
            (num_images, height + width) int64: first the source row of each output row, then the source
            column of each output column. Values below 0 or past the image's edge lie in the padding.
        """
        generator = keyed_generator(self.seed, RandomStream.CROP_FLIP, iteration, slot)
        offsets = generator.integers(-self.padding, self.padding, size=(2, num_images, 1), endpoint=True)
        mirrored = generator.random((num_images, 1)) < (0.5 if self.flip else 0.0)
        columns = np.arange(width)
        return np.concatenate(
            [np.arange(height) + offsets[0], np.where(mirrored, columns[::-1], columns) + offsets[1]], axis=1
        )

    def corners(self, num_images: int, height: int, width: int, iteration: int, slot: int) -> np.ndarray:
        """Row and column in the image where each crop begins, (num_images, 2) int64, -padding ... padding."""
        pixels = self.pixels(num_images, height, width, iteration, slot)
        return np.stack([pixels[:, 0], pixels[:, height:].min(axis=1)], axis=1)

    def apply(self, images: Tensor, iteration: int, slot: int) -> Tensor:
        """Crop and flip each image on its own.

        Args:
            images: (N, C, H, W).
            iteration: Iteration of the run, >= 0.
            slot: Slot of the global batch, >= 0.

        Returns:
            A new tensor of the same shape, or `images` itself when there is nothing to do.
        """
        if self.padding == 0 and not self.flip:
            return images
        num_images, channels, height, width = images.shape
        pixels = to_device(torch.from_numpy(self.pixels(num_images, height, width, iteration, slot)), images.device)
        rows, columns = pixels[:, :height, None], pixels[:, None, height:]
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        sources = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        # One gather over flattened pixels: four times as fast on a CPU as indexing rows and columns.
        sources = sources.view(num_images, 1, height * width).expand(-1, channels, -1)
        cropped = images.flatten(2).gather(2, sources).view(images.shape)
        return cropped.masked_fill_(~inside[:, None], 0.0)


class RunningMixup:
    """Running mixup: each batch is mixed with the previous *virtual* batch of its slot (Eq. 9-11).

    x(t) <- lambda x(t) + (1 - lambda) x(t-1), labels likewise, with one lambda ~ Beta(alpha, alpha) for each
    sample. A slot's first batch is taken as it is.

    Args:
        alpha: Parameter of the Beta distribution, >= 0; 0 turns mixing off, and nothing is kept.
        seed: The run's seed, >= 0.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha = alpha
        self.seed = seed
        self._previous: dict[int, tuple[Tensor, Tensor]] = {}

    def mix(self, images: Tensor, labels: Tensor, iteration: int, slot: int) -> tuple[Tensor, Tensor]:
        """Mix a slot's batch with what this call returned for the slot the last time.

        The returned tensors are kept for the next call, so they must not be changed in place.

        Args:
            images: (N, C, H, W).
            labels: (N, num_classes), rows that sum to 1.
            iteration: Iteration of the run, >= 0.
            slot: Slot of the global batch, >= 0.

        Raises:
            InputError: If the slot's previous batch has another shape, as after resuming with other batch
                sizes.
        """
        if self.alpha == 0:
            return images, labels
        if slot in self._previous:
            old_images, old_labels = self._previous[slot]
            if old_images.shape != images.shape or old_labels.shape != labels.shape:
                raise InputError(
                    f"running mixup's state of slot {slot} has images {tuple(old_images.shape)} and labels "
                    f"{tuple(old_labels.shape)}, got {tuple(images.shape)} and {tuple(labels.shape)}: "
                    "batch.per_rank, the images and the classes must stay what they were when it was saved"
                )
            generator = keyed_generator(self.seed, RandomStream.MIXUP, iteration, slot)
            shares = torch.from_numpy(generator.beta(self.alpha, self.alpha, size=len(images)))
            weights = to_device(shares.to(images.dtype), images.device)
            images = torch.lerp(old_images.to(images), images, weights[:, None, None, None])
            labels = torch.lerp(old_labels.to(labels), labels, weights[:, None].to(labels))
        self._previous[slot] = images, labels
        return images, labels

    def state_dict(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Images and labels of the virtual batches of the slots seen so far, by slot; not copied."""
        return dict(sorted(self._previous.items()))

    def load_state_dict(self, state: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Replace the virtual batches by those of `state_dict`; they move to the images' device when used."""
        self._previous = dict(state)


@dataclass(frozen=True)
class RandomErasing:
    """Random erasing: a rectangle of zeros in some of the images.

    Each image is chosen with `probability`. Its rectangle covers a share of the image ~ U(area) with
    height / width ~ U(aspect), height and width swapped with probability one half. Sides are rounded to whole
    pixels and cut to between one pixel and the image's side, and the place is uniform over those where the
    rectangle fits.

    Attributes:
        probability: In [0, 1].
        area: Lowest and highest share of the image's area.
        aspect: Lowest and highest aspect ratio.
        seed: The run's seed, >= 0.
    """

    probability: float
    area: tuple[float, float]
    aspect: tuple[float, float]
    seed: int

    def rectangles(self, num_images: int, height: int, width: int, iteration: int, slot: int) -> np.ndarray:
        """Rectangles of a batch.

        Returns:
            (num_images, 4) int64 of top, bottom, left, right, bottom and right exclusive; all zeros for an
            image that is not chosen.
        """
        generator = keyed_generator(self.seed, RandomStream.ERASING, iteration, slot)
        chosen = generator.random(num_images) < self.probability
        area = generator.uniform(*self.area, num_images) * height * width
        root_aspect = np.sqrt(generator.uniform(*self.aspect, num_images))
        root_aspect = np.where(generator.random(num_images) < 0.5, root_aspect, 1.0 / root_aspect)
        heights = np.clip(np.rint(np.sqrt(area) * root_aspect), 1, height).astype(np.int64)
        widths = np.clip(np.rint(np.sqrt(area) / root_aspect), 1, width).astype(np.int64)
        top = generator.integers(0, height - heights, endpoint=True)
        left = generator.integers(0, width - widths, endpoint=True)
        return np.stack([top, top + heights, left, left + widths], axis=1) * chosen[:, None]

    def apply(self, images: Tensor, iteration: int, slot: int) -> Tensor:
        """Erase one rectangle in each chosen image.

        Args:
            images: (N, C, H, W); unchanged, because running mixup may still hold it.
            iteration: Iteration of the run, >= 0.
            slot: Slot of the global batch, >= 0.

        Returns:
            A new tensor of the same shape and dtype, or `images` itself where no image was chosen.
        """
        num_images, _, height, width = images.shape
        bounds = self.rectangles(num_images, height, width, iteration, slot)
        if not bounds.any():
            return images
        top, bottom, left, right = to_device(torch.from_numpy(bounds), images.device).T[:, :, None]
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        erased_rows = (rows >= top) & (rows < bottom)
        erased_columns = (columns >= left) & (columns < right)
        return images.masked_fill((erased_rows[:, :, None] & erased_columns[:, None, :])[:, None], 0.0)


class Augmentation:
    """What becomes of a slot's batch after the data set: soft labels, running mixup, random erasing."""

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int) -> None:
        """Set up.

        Args:
            config: The `augment` section.
            num_classes: Of the data set.
            seed: The run's seed, >= 0.
        """
        self._num_classes = num_classes
        self._mixup = RunningMixup(config.mixup_alpha, seed)
        erasing = config.erasing
        self._erasing = RandomErasing(erasing.probability, erasing.area, erasing.aspect, seed) if erasing else None

    def apply(self, batch: Batch) -> Batch:
        """The batch that is trained on."""
        return self.steps(batch)[-1][1]

    def steps(self, batch: Batch) -> list[tuple[str, Batch]]:
        """The batch after each step that changes it, with the step's name; labels are soft from the first on."""
        labels = soft_labels(batch.labels, self._num_classes, batch.images.dtype)
        batch = replace(batch, labels=labels)
        steps = [("crop and flip", batch)]
        if self._mixup.alpha:
            images, labels = self._mixup.mix(batch.images, batch.labels, batch.iteration, batch.slot)
            batch = replace(batch, images=images, labels=labels)
            steps.append((f"running mixup\nα = {self._mixup.alpha:g}", batch))
        if self._erasing is not None:
            batch = replace(batch, images=self._erasing.apply(batch.images, batch.iteration, batch.slot))
            steps.append((f"random erasing\np = {self._erasing.probability:g}", batch))
        return steps

    def state_dict(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Running mixup's virtual batches, by slot."""
        return self._mixup.state_dict()

    def load_state_dict(self, state: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Restore what `state_dict` returned."""
        self._mixup.load_state_dict(state)

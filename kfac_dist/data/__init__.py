"""Training data: readers, the order of samples, and batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kfac_dist.augment import CropFlip
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.digits import read_digits
from kfac_dist.data.in_memory import Dataset, ImageArrays
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.svhn import read_svhn
from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config import AugmentConfig, DataConfig

__all__ = ["Dataset", "ImageArrays", "SlotSampler", "create_dataset", "describe_dataset"]

_READERS_OF_FOLDERS = {"cifar10": read_cifar10, "svhn": read_svhn}


@dataclass(frozen=True)
class DatasetDescription:
    """What is known of a data set without its files; `image_shape` is (channels, height, width)."""

    num_train: int
    num_classes: int
    image_shape: tuple[int, int, int]


_DESCRIPTIONS = {
    "digits": DatasetDescription(1438, 10, (1, 8, 8)),
    "cifar10": DatasetDescription(50_000, 10, (3, 32, 32)),
    "svhn": DatasetDescription(73_257, 10, (3, 32, 32)),
}


def describe_dataset(data: DataConfig) -> DatasetDescription:
    """Sizes of the data set that a configuration names, as published; reads no files."""
    description = _DESCRIPTIONS[data.name]
    return replace(description, num_train=min(description.num_train, data.train_limit or description.num_train))


def create_dataset(
    data: DataConfig, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> Dataset:
    """Read the data set that a configuration names, cut it to the wanted size and move it to the device.

    Args:
        data: The `data` section.
        augment: The `augment` section, of which `pad_crop` and `flip` are used here.
        device: Where the data are held and batches are made.
        dtype: Floating type of the batches.
        seed: The run's seed, >= 0.

    Raises:
        InputError: If files are missing or damaged, or a limit exceeds the images there are.
    """
    if data.name == "digits":
        arrays = read_digits()
    else:
        assert data.root is not None  # refused by the configuration
        arrays = _READERS_OF_FOLDERS[data.name](Path(data.root).expanduser())
    arrays = _first(arrays, data.train_limit, data.eval_limit)
    return Dataset(arrays, CropFlip(augment.pad_crop, augment.flip, seed), device, dtype)


def _first(arrays: ImageArrays, train_limit: int | None, eval_limit: int | None) -> ImageArrays:
    for key, limit, available in (
        ("train_limit", train_limit, len(arrays.train_labels)),
        ("eval_limit", eval_limit, len(arrays.eval_labels)),
    ):
        if limit is not None and limit > available:
            raise InputError(f"data.{key} must be <= {available}, the images there are, got {limit}")
    return replace(
        arrays,
        train_images=arrays.train_images[:train_limit],
        train_labels=arrays.train_labels[:train_limit],
        eval_images=arrays.eval_images[:eval_limit],
        eval_labels=arrays.eval_labels[:eval_limit],
    )

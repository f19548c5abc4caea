"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kfac_dist.communicator import Communicator
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.config.entry_points import GUIDE
from kfac_dist.data.augment import CropFlip
from kfac_dist.data.base import Dataset
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.description import DatasetDescription, check_limits, cut, limits
from kfac_dist.data.digits import read_digits
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset, check_arrays, downsample
from kfac_dist.data.svhn import read_svhn
from kfac_dist.data.synthetic import SyntheticDataset
from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config.data import Cifar10Config, DataSet, ImagenetConfig, SvhnConfig, SyntheticConfig
    from kfac_dist.config.schema import AugmentConfig


_ALONE = LocalCommunicator()


def describe_dataset(data: DataSet) -> DatasetDescription:
    """Sizes of the data set that a configuration names, as published; opens no images.

    For `imagenet` the folder is listed where there is one, since any tree of the layout may stand for it. A data set of
    an installed package is read.
    """
    return _entry(data).describe(data)


def create_dataset(
    data: DataSet,
    augment: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    communicator: Communicator = _ALONE,
) -> Dataset:
    """Read the data set that a configuration names, or list its files, and cut it to the wanted size.

    Args:
        data: The `data` section.
        augment: The `augment` section, of which `pad_crop` and `flip` are used here.
        device: Where batches are made.
        dtype: Floating type of the batches.
        seed: The run's seed, >= 0.
        communicator: Of all ranks that call this, of which rank 0 lists files for all.

    Raises:
        InputError: If files are missing or damaged, a limit exceeds the images there are, the padding leaves nothing of
            an image, or the loader is not installed.
    """
    return _entry(data).create(data, augment, device, dtype, seed, communicator)


# Data sets held in memory ------------------------------------------------------------------------------


def _create_in_memory(
    read: Callable[[Any], ImageArrays],
    data: DataSet,
    augment: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    communicator: Communicator,
) -> InMemoryDataset:
    del communicator  # every rank reads for itself
    arrays = read(data)
    side = min(arrays.train_images.shape[2:])
    if augment.pad_crop >= side:
        raise InputError(f"augment.pad_crop must be < {side}, the side of an image, got {augment.pad_crop}")
    check_limits(data, len(arrays.train_labels), len(arrays.eval_labels))
    num_train, num_eval = limits(data)
    first = replace(
        arrays,
        train_images=arrays.train_images[:num_train],
        train_labels=arrays.train_labels[:num_train],
        eval_images=arrays.eval_images[:num_eval],
        eval_labels=arrays.eval_labels[:num_eval],
    )
    return InMemoryDataset(first, CropFlip(augment.pad_crop, augment.flip, seed), device, dtype)


# Data sets of installed packages ---------------------------------------------------------------------


def _read_own(data: Any) -> ImageArrays:
    """What the section's own `read` returns; every error names the data set."""
    try:
        arrays = data.read()
        if not isinstance(arrays, ImageArrays):
            raise InputError(
                f"read must return kfac_dist.data.in_memory.ImageArrays, got {type(arrays).__name__}: see {GUIDE}"
            )
        check_arrays(arrays)
    except (InputError, OSError) as error:
        raise InputError(f"data.name {data.name} ({type(data).__module__}.{type(data).__name__}): {error}") from error
    return arrays


def _describe_own(data: Any) -> DatasetDescription:
    arrays = _read_own(data)
    channels, height, width = arrays.train_images.shape[1:]
    return cut(DatasetDescription(len(arrays.train_labels), len(arrays.class_names), (channels, height, width)), data)


# ImageNet ----------------------------------------------------------------------------------------------


def _create_imagenet(*arguments: Any) -> Dataset:
    from kfac_dist.data.imagenet.create import create_imagenet  # loads Pillow and more, 30 ms

    return create_imagenet(*arguments)


def _describe_imagenet(data: ImagenetConfig) -> DatasetDescription:
    from kfac_dist.data.imagenet.create import describe_imagenet

    return describe_imagenet(data)


# Images that are made up -------------------------------------------------------------------------------


def _create_synthetic(
    data: SyntheticConfig,
    augment: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    communicator: Communicator,
) -> SyntheticDataset:
    del augment, communicator  # the configuration refuses what would change the images
    made = data.synthetic
    return SyntheticDataset(made.shape, made.num_classes, made.num_train, made.num_eval, device, dtype, seed)


def _describe_synthetic(data: SyntheticConfig) -> DatasetDescription:
    made = data.synthetic
    return DatasetDescription(made.num_train, made.num_classes, made.shape)


# All of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """How a data set is made, and what is known of it before; each takes its own section of the configuration."""

    create: Callable[[Any, AugmentConfig, torch.device, torch.dtype, int, Communicator], Dataset]
    describe: Callable[[Any], DatasetDescription]


def _in_memory(
    read: Callable[[Any], ImageArrays], num_train: int, num_classes: int, image_shape: tuple[int, int, int]
) -> _Source:
    published = DatasetDescription(num_train, num_classes, image_shape)
    return _Source(partial(_create_in_memory, read), partial(cut, published))


def _files_in_memory(read: Callable[[Path], ImageArrays], num_train: int) -> _Source:
    published = DatasetDescription(num_train, 10, (3, 32, 32))
    return _Source(partial(_create_in_memory, _from_root(read)), partial(_describe_downsampled, published))


def _from_root(read: Callable[[Path], ImageArrays]) -> Callable[[Any], ImageArrays]:
    return lambda data: downsample(read(Path(data.root).expanduser()), data.downsample)


def _describe_downsampled(published: DatasetDescription, data: Cifar10Config | SvhnConfig) -> DatasetDescription:
    channels, height, width = published.image_shape
    shape = channels, height // data.downsample, width // data.downsample
    return cut(replace(published, image_shape=shape), data)


# A row for each of `kfac_dist.config.data.BUILT_IN`.
_SOURCES = {
    "digits": _in_memory(lambda data: read_digits(), 1438, 10, (1, 8, 8)),
    "cifar10": _files_in_memory(read_cifar10, 50_000),
    "svhn": _files_in_memory(read_svhn, 73_257),
    "imagenet": _Source(_create_imagenet, _describe_imagenet),
    "synthetic": _Source(_create_synthetic, _describe_synthetic),
}
_OWN = _Source(partial(_create_in_memory, _read_own), _describe_own)


def _entry(data: DataSet) -> _Source:
    return _SOURCES.get(data.name, _OWN)

"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kfac_dist.config.entry_points import GUIDE
from kfac_dist.data.augment import CropFlip
from kfac_dist.data.base import Dataset
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.digits import read_digits
from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import FolderDataset, Normalisation
from kfac_dist.data.imagenet.decoder import Decoder, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.mean_image import load_mean_image
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset, check_arrays, downsample
from kfac_dist.data.svhn import read_svhn
from kfac_dist.data.synthetic import SyntheticDataset
from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config.data import Cifar10Config, DataSet, ImagenetConfig, SvhnConfig, SyntheticConfig
    from kfac_dist.config.schema import AugmentConfig


@dataclass(frozen=True)
class DatasetDescription:
    """What is known of a data set without its files; `image_shape` is (channels, height, width)."""

    num_train: int
    num_classes: int
    image_shape: tuple[int, int, int]


def describe_dataset(data: DataSet) -> DatasetDescription:
    """Sizes of the data set that a configuration names, as published; opens no images.

    For `imagenet` the folder is listed where there is one, since any tree of the layout may stand for it. A data set of
    an installed package is read.
    """
    return _entry(data).describe(data)


def create_dataset(
    data: DataSet, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> Dataset:
    """Read the data set that a configuration names, or list its files, and cut it to the wanted size.

    Args:
        data: The `data` section.
        augment: The `augment` section, of which `pad_crop` and `flip` are used here.
        device: Where batches are made.
        dtype: Floating type of the batches.
        seed: The run's seed, >= 0.

    Raises:
        InputError: If files are missing or damaged, a limit exceeds the images there are, the padding leaves nothing of
            an image, or the loader is not installed.
    """
    return _entry(data).create(data, augment, device, dtype, seed)


# Data sets held in memory ------------------------------------------------------------------------------


def _create_in_memory(
    read: Callable[[Any], ImageArrays],
    data: DataSet,
    augment: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> InMemoryDataset:
    arrays = read(data)
    side = min(arrays.train_images.shape[2:])
    if augment.pad_crop >= side:
        raise InputError(f"augment.pad_crop must be < {side}, the side of an image, got {augment.pad_crop}")
    _check_limits(data, len(arrays.train_labels), len(arrays.eval_labels))
    num_train, num_eval = _limits(data)
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
    return _cut(DatasetDescription(len(arrays.train_labels), len(arrays.class_names), (channels, height, width)), data)


# ImageNet ----------------------------------------------------------------------------------------------


def _create_imagenet(
    data: ImagenetConfig, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> FolderDataset:
    root = Path(data.root).expanduser()
    train = list_images(root, "train")
    evaluation = list_images(root, "val", train.class_names)
    _check_limits(data, len(train), len(evaluation))
    normalisation = Normalisation.by_channel()
    if data.mean_image is not None:
        path = Path(data.mean_image).expanduser()
        normalisation = Normalisation.by_mean_image(load_mean_image(path, data.image_size, train, root))
    return FolderDataset(
        train.evenly(data.train_limit),
        evaluation.evenly(data.eval_limit),
        Crops(data.preprocessing, data.image_size, augment.flip, seed),
        normalisation,
        _create_decoder(data, device),
        data.on_error == "skip",
        device,
        dtype,
    )


def _create_decoder(data: ImagenetConfig, device: torch.device) -> Decoder:
    if data.loader == "dali":
        return DaliDecoder(data.image_size, data.workers, device)
    return ThreadDecoder(data.image_size, data.workers, pin_memory=device.type == "cuda")


def _describe_imagenet(data: ImagenetConfig) -> DatasetDescription:
    root = Path(data.root).expanduser()
    num_train, num_classes = 1_281_167, 1000
    if root.is_dir():
        train = list_images(root, "train")
        num_train, num_classes = len(train), len(train.class_names)
    return _cut(DatasetDescription(num_train, num_classes, (3, data.image_size, data.image_size)), data)


# Images that are made up -------------------------------------------------------------------------------


def _create_synthetic(
    data: SyntheticConfig, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> SyntheticDataset:
    del augment  # the configuration refuses what would change the images
    made = data.synthetic
    return SyntheticDataset(made.shape, made.num_classes, made.num_train, made.num_eval, device, dtype, seed)


def _describe_synthetic(data: SyntheticConfig) -> DatasetDescription:
    made = data.synthetic
    return DatasetDescription(made.num_train, made.num_classes, made.shape)


# Limits ------------------------------------------------------------------------------------------------


def _limits(data: DataSet) -> tuple[int | None, int | None]:
    """Of training and evaluation images; a data set of an installed package need not have these keys."""
    return getattr(data, "train_limit", None), getattr(data, "eval_limit", None)


def _check_limits(data: DataSet, num_train: int, num_eval: int) -> None:
    available = {"train_limit": num_train, "eval_limit": num_eval}
    for (key, most), limit in zip(available.items(), _limits(data), strict=True):
        if limit is not None and limit > most:
            raise InputError(f"data.{key} must be <= {most}, the images there are, got {limit}")


def _cut(description: DatasetDescription, data: DataSet) -> DatasetDescription:
    train_limit, _ = _limits(data)
    return replace(description, num_train=min(description.num_train, train_limit or description.num_train))


# All of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DataSet:
    """How a data set is made, and what is known of it before; each takes its own section of the configuration."""

    create: Callable[[Any, AugmentConfig, torch.device, torch.dtype, int], Dataset]
    describe: Callable[[Any], DatasetDescription]


def _in_memory(
    read: Callable[[Any], ImageArrays], num_train: int, num_classes: int, image_shape: tuple[int, int, int]
) -> _DataSet:
    published = DatasetDescription(num_train, num_classes, image_shape)
    return _DataSet(partial(_create_in_memory, read), partial(_cut, published))


def _files_in_memory(read: Callable[[Path], ImageArrays], num_train: int) -> _DataSet:
    published = DatasetDescription(num_train, 10, (3, 32, 32))
    return _DataSet(partial(_create_in_memory, _from_root(read)), partial(_describe_downsampled, published))


def _from_root(read: Callable[[Path], ImageArrays]) -> Callable[[Any], ImageArrays]:
    return lambda data: downsample(read(Path(data.root).expanduser()), data.downsample)


def _describe_downsampled(published: DatasetDescription, data: Cifar10Config | SvhnConfig) -> DatasetDescription:
    channels, height, width = published.image_shape
    shape = channels, height // data.downsample, width // data.downsample
    return _cut(replace(published, image_shape=shape), data)


# A row for each of `kfac_dist.config.data.BUILT_IN`.
_DATA_SETS = {
    "digits": _in_memory(lambda data: read_digits(), 1438, 10, (1, 8, 8)),
    "cifar10": _files_in_memory(read_cifar10, 50_000),
    "svhn": _files_in_memory(read_svhn, 73_257),
    "imagenet": _DataSet(_create_imagenet, _describe_imagenet),
    "synthetic": _DataSet(_create_synthetic, _describe_synthetic),
}
_OWN = _DataSet(partial(_create_in_memory, _read_own), _describe_own)


def _entry(data: DataSet) -> _DataSet:
    return _DATA_SETS.get(data.name, _OWN)

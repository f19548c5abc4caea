"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset
from kfac_dist.data.svhn import read_svhn
from kfac_dist.data.synthetic import SyntheticDataset
from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config.data import (
        Cifar10Config,
        DataConfig,
        DigitsConfig,
        ImagenetConfig,
        SvhnConfig,
        SyntheticConfig,
    )
    from kfac_dist.config.schema import AugmentConfig

    InMemoryConfig = DigitsConfig | Cifar10Config | SvhnConfig


@dataclass(frozen=True)
class DatasetDescription:
    """What is known of a data set without its files; `image_shape` is (channels, height, width)."""

    num_train: int
    num_classes: int
    image_shape: tuple[int, int, int]


def describe_dataset(data: DataConfig) -> DatasetDescription:
    """Sizes of the data set that a configuration names, as published; opens no images.

    For `imagenet` the folder is listed where there is one, since any tree of the layout may stand for it.
    """
    return _DATA_SETS[data.name].describe(data)


def create_dataset(
    data: DataConfig, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
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
    return _DATA_SETS[data.name].create(data, augment, device, dtype, seed)


# Data sets held in memory ------------------------------------------------------------------------------


def _create_in_memory(
    read: Callable[[Any], ImageArrays],
    data: InMemoryConfig,
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
    first = replace(
        arrays,
        train_images=arrays.train_images[: data.train_limit],
        train_labels=arrays.train_labels[: data.train_limit],
        eval_images=arrays.eval_images[: data.eval_limit],
        eval_labels=arrays.eval_labels[: data.eval_limit],
    )
    return InMemoryDataset(first, CropFlip(augment.pad_crop, augment.flip, seed), device, dtype)


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


def _check_limits(data: InMemoryConfig | ImagenetConfig, num_train: int, num_eval: int) -> None:
    for key, limit, available in (
        ("train_limit", data.train_limit, num_train),
        ("eval_limit", data.eval_limit, num_eval),
    ):
        if limit is not None and limit > available:
            raise InputError(f"data.{key} must be <= {available}, the images there are, got {limit}")


def _cut(description: DatasetDescription, data: InMemoryConfig | ImagenetConfig) -> DatasetDescription:
    return replace(description, num_train=min(description.num_train, data.train_limit or description.num_train))


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


def _from_root(read: Callable[[Path], ImageArrays]) -> Callable[[Any], ImageArrays]:
    return lambda data: read(Path(data.root).expanduser())


_DATA_SETS = {
    "digits": _in_memory(lambda data: read_digits(), 1438, 10, (1, 8, 8)),
    "cifar10": _in_memory(_from_root(read_cifar10), 50_000, 10, (3, 32, 32)),
    "svhn": _in_memory(_from_root(read_svhn), 73_257, 10, (3, 32, 32)),
    "imagenet": _DataSet(_create_imagenet, _describe_imagenet),
    "synthetic": _DataSet(_create_synthetic, _describe_synthetic),
}

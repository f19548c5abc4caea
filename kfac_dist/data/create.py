"""Training data: readers, the order of samples, and batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kfac_dist.data.augment import CropFlip
from kfac_dist.data.base import Dataset, Original
from kfac_dist.data.cifar10 import read_cifar10
from kfac_dist.data.digits import read_digits
from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import FolderDataset, Normalisation
from kfac_dist.data.imagenet.decoder import Decoder, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.mean_image import load_mean_image
from kfac_dist.data.in_memory import ImageArrays, InMemoryDataset
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.data.svhn import read_svhn
from kfac_dist.data.synthetic import SyntheticDataset
from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config.data import DataConfig
    from kfac_dist.config.schema import AugmentConfig

__all__ = [
    "Dataset",
    "FolderDataset",
    "ImageArrays",
    "InMemoryDataset",
    "Original",
    "SlotSampler",
    "create_dataset",
    "describe_dataset",
]

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
_NUM_IMAGENET, _NUM_IMAGENET_CLASSES = 1_281_167, 1000


def describe_dataset(data: DataConfig) -> DatasetDescription:
    """Sizes of the data set that a configuration names, as published; opens no images.

    For `imagenet` the folder is listed where there is one, since any tree of the layout may stand for it.
    """
    if data.synthetic is not None:
        made = data.synthetic
        return DatasetDescription(made.num_train, made.num_classes, made.shape)
    if data.name == "imagenet":
        assert data.image_size is not None  # the configuration's default
        shape = (3, data.image_size, data.image_size)
        description = DatasetDescription(_NUM_IMAGENET, _NUM_IMAGENET_CLASSES, shape)
        if _root(data).is_dir():
            train = list_images(_root(data), "train")
            description = DatasetDescription(len(train), len(train.class_names), shape)
    else:
        description = _DESCRIPTIONS[data.name]
    return replace(description, num_train=min(description.num_train, data.train_limit or description.num_train))


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
        InputError: If files are missing or damaged, a limit exceeds the images there are, or the loader is
            not installed.
    """
    if data.synthetic is not None:
        made = data.synthetic
        return SyntheticDataset(made.shape, made.num_classes, made.num_train, made.num_eval, device, dtype, seed)
    if data.name == "imagenet":
        return _create_imagenet(data, augment, device, dtype, seed)
    arrays = read_digits() if data.name == "digits" else _READERS_OF_FOLDERS[data.name](_root(data))
    arrays = _first(arrays, data.train_limit, data.eval_limit)
    return InMemoryDataset(arrays, CropFlip(augment.pad_crop, augment.flip, seed), device, dtype)


def _create_imagenet(
    data: DataConfig, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> FolderDataset:
    # Defaults of the configuration, and what it refuses to leave out.
    assert data.image_size is not None
    assert data.preprocessing is not None
    root = _root(data)
    train = list_images(root, "train")
    evaluation = list_images(root, "val", train.class_names)
    _check_limits(data.train_limit, data.eval_limit, len(train), len(evaluation))
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


def _create_decoder(data: DataConfig, device: torch.device) -> Decoder:
    assert data.image_size is not None
    assert data.workers is not None
    if data.loader == "dali":
        return DaliDecoder(data.image_size, data.workers, device)
    return ThreadDecoder(data.image_size, data.workers, pin_memory=device.type == "cuda")


def _root(data: DataConfig) -> Path:
    assert data.root is not None  # refused by the configuration
    return Path(data.root).expanduser()


def _first(arrays: ImageArrays, train_limit: int | None, eval_limit: int | None) -> ImageArrays:
    _check_limits(train_limit, eval_limit, len(arrays.train_labels), len(arrays.eval_labels))
    return replace(
        arrays,
        train_images=arrays.train_images[:train_limit],
        train_labels=arrays.train_labels[:train_limit],
        eval_images=arrays.eval_images[:eval_limit],
        eval_labels=arrays.eval_labels[:eval_limit],
    )


def _check_limits(train_limit: int | None, eval_limit: int | None, num_train: int, num_eval: int) -> None:
    for key, limit, available in (
        ("train_limit", train_limit, num_train),
        ("eval_limit", eval_limit, num_eval),
    ):
        if limit is not None and limit > available:
            raise InputError(f"data.{key} must be <= {available}, the images there are, got {limit}")

"""The data set `imagenet` as a configuration names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kfac_dist.communicator import Communicator
from kfac_dist.data.description import DatasetDescription, check_limits, cut
from kfac_dist.data.imagenet.crops import Crops
from kfac_dist.data.imagenet.dali import DaliDecoder
from kfac_dist.data.imagenet.dataset import FolderDataset, Normalisation
from kfac_dist.data.imagenet.decoder import Decoder, ThreadDecoder
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.mean_image import load_mean_image

if TYPE_CHECKING:
    from kfac_dist.config.data import ImagenetConfig
    from kfac_dist.config.schema import AugmentConfig


def create_imagenet(
    data: ImagenetConfig,
    augment: AugmentConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    communicator: Communicator,
) -> FolderDataset:
    """List both splits and make what reads them; see `kfac_dist.data.create.create_dataset`. Collective."""
    root = Path(data.root).expanduser()
    train = list_images(root, "train", None, communicator)
    evaluation = list_images(root, "val", train.class_names, communicator)
    check_limits(data, len(train), len(evaluation))
    normalisation = Normalisation.by_channel()
    if data.mean_image is not None:
        path = Path(data.mean_image).expanduser()
        # Its fingerprint takes a look at every file: one rank's work.
        mean = load_mean_image(path, data.image_size, train, root, compares_images=communicator.is_main)
        normalisation = Normalisation.by_mean_image(mean)
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


def describe_imagenet(data: ImagenetConfig) -> DatasetDescription:
    """Sizes of the tree, where there is one, else as published."""
    root = Path(data.root).expanduser()
    num_train, num_classes = 1_281_167, 1000
    if root.is_dir():
        train = list_images(root, "train")
        num_train, num_classes = len(train), len(train.class_names)
    return cut(DatasetDescription(num_train, num_classes, (3, data.image_size, data.image_size)), data)

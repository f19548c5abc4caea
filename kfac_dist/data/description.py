"""What is known of a data set without its files, and the limits of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kfac_dist.errors import InputError

if TYPE_CHECKING:
    from kfac_dist.config.data import DataSet


@dataclass(frozen=True)
class DatasetDescription:
    """What is known of a data set without its files; `image_shape` is (channels, height, width)."""

    num_train: int
    num_classes: int
    image_shape: tuple[int, int, int]


def limits(data: DataSet) -> tuple[int | None, int | None]:
    """Of training and evaluation images; a data set of an installed package need not have these keys."""
    return getattr(data, "train_limit", None), getattr(data, "eval_limit", None)


def check_limits(data: DataSet, num_train: int, num_eval: int) -> None:
    """Compare the limits with the images there are.

    Raises:
        InputError: If one is larger.
    """
    available = {"train_limit": num_train, "eval_limit": num_eval}
    for (key, most), limit in zip(available.items(), limits(data), strict=True):
        if limit is not None and limit > most:
            raise InputError(f"data.{key} must be <= {most}, the images there are, got {limit}")


def cut(description: DatasetDescription, data: DataSet) -> DatasetDescription:
    """The description of what the configuration's limit leaves."""
    train_limit, _ = limits(data)
    return replace(description, num_train=min(description.num_train, train_limit or description.num_train))

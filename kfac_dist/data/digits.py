"""The digits that come with scikit-learn: 1,797 grey images of 8x8 in ten classes. Nothing to download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kfac_dist.data.in_memory import ImageArrays

_SPLIT_SEED = 2019  # part of the data set, not of a run: every run is tested on the same images
_EVAL_SHARE = 0.2
_FILE = "datasets/data/digits.csv.gz"  # in scikit-learn's folder


def read_digits() -> ImageArrays:
    """The digits, split 1,438 to 359 with the share of each class kept.

    Pixel values are scikit-learn's own 0 ... 16.
    """
    table = _read_table()
    images, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    generator = np.random.default_rng(_SPLIT_SEED)
    is_eval = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(labels == digit))
        is_eval[members[: round(_EVAL_SHARE * len(members))]] = True
    order = generator.permutation(len(labels))  # so that the first images, too, are of mixed classes
    train, evaluation = order[~is_eval[order]], order[is_eval[order]]
    return ImageArrays(
        train_images=images[train],
        train_labels=labels[train],
        eval_images=images[evaluation],
        eval_labels=labels[evaluation],
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _read_table() -> np.ndarray:
    """(1797, 65) uint8: the pixels of an image, and its label.

    scikit-learn's reader is not asked where its file is found: importing it takes a second, the file 3 ms.
    """
    package = find_spec("sklearn")
    if package is not None and package.origin is not None and (path := Path(package.origin).parent / _FILE).is_file():
        return np.loadtxt(path, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.uint8)

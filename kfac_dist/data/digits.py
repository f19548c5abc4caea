"""The digits that come with scikit-learn: 1,797 grey images of 8x8 in ten classes. Nothing to download."""

from __future__ import annotations

import numpy as np

from kfac_dist.data.in_memory import ImageArrays

_SPLIT_SEED = 2019  # part of the data set, not of a run: every run is tested on the same images
_EVAL_SHARE = 0.2


def read_digits() -> ImageArrays:
    """The digits, split 1,438 to 359 with the share of each class kept.

    Pixel values are scikit-learn's own 0 ... 16.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
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

"""SVHN, cropped digits (format 2): `train_32x32.mat` and `test_32x32.mat`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kfac_dist.data.in_memory import ImageArrays
from kfac_dist.errors import InputError

URL = "http://ufldl.stanford.edu/housenumbers"
FILES = ("train_32x32.mat", "test_32x32.mat")


def read_svhn(root: Path) -> ImageArrays:
    """Read the training and the test images.

    Args:
        root: Folder with the two files.

    Raises:
        InputError: If a file is missing or damaged; the message names it.
    """
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        raise InputError(
            f"data.root must contain {' and '.join(FILES)}, got {root}, where {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: fetch them from {URL}"
        )
    (train_images, train_labels), (eval_images, eval_labels) = (_read_file(root / name) for name in FILES)
    return ImageArrays(
        train_images,
        train_labels,
        eval_images,
        eval_labels,
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one file."""
    from scipy.io import loadmat  # slow to import, and only this data set needs it

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"].ravel()
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)) or len(labels) == 0:
            raise ValueError(f"X {images.dtype} {images.shape} and y {labels.shape} are not images and their labels")
        if labels.min() < 1 or labels.max() > 10:
            raise ValueError("labels outside 1 ... 10")
    except Exception as error:  # a damaged file fails in any way inside the parser
        raise InputError(
            f"{path} is not an SVHN file ({error!r}): it is truncated or damaged, fetch {URL}/{path.name} again"
        ) from error
    digits = labels.astype(np.int64) % 10  # the file counts 1 ... 10, with 10 for the digit 0
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), digits

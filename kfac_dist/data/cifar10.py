"""CIFAR-10 from its original Python batches, read without running what a pickle could contain.

torchvision's reader unpickles with `pickle.load`, which executes code that a file carries; it has only the
MD5 sum, for which a second file can be forged, between a stranger's file and that. It also refuses any
shortened copy, and reports a damaged file as "not found or corrupted" without its name. So the batches are
read here: an unpickler that can build only NumPy arrays of numbers, then checks of the structure, and
the published MD5 sums for whole batches.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from kfac_dist.data.in_memory import ImageArrays
from kfac_dist.errors import InputError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
# As in torchvision, which would take a second or two to import. By file, in their order.
TRAIN_SUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
EVAL_SUMS = {"test_batch": "40351d587109b95175f43aff81a1287e"}

_WHOLE_BATCH = 10_000
_VALUES = 3 * 32 * 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def read_cifar10(root: Path) -> ImageArrays:
    """Read the five training batches and the test batch.

    Args:
        root: The folder `cifar-10-batches-py`, or the folder that contains it.

    Raises:
        InputError: If the folder or a batch is missing, or a batch is damaged; the message names the file.
    """
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    missing = [name for name in (*TRAIN_SUMS, *EVAL_SUMS) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"data.root must be the folder {FOLDER} or contain it, got {root}, where {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: unpack {URL} there"
        )
    train = [_read_batch(folder / name, md5) for name, md5 in TRAIN_SUMS.items()]
    evaluation = [_read_batch(folder / name, md5) for name, md5 in EVAL_SUMS.items()]
    return ImageArrays(
        train_images=np.concatenate([images for images, _ in train]),
        train_labels=np.concatenate([labels for _, labels in train]),
        eval_images=np.concatenate([images for images, _ in evaluation]),
        eval_labels=np.concatenate([labels for _, labels in evaluation]),
        class_names=CLASS_NAMES,
    )


def _read_batch(path: Path, published_md5: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one batch."""
    content = path.read_bytes()
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = _checked(batch)
    except Exception as error:  # a damaged pickle fails in any way
        raise InputError(
            f"{path} is not a CIFAR-10 batch ({error}): it is truncated, damaged or of another program; "
            f"unpack {URL} again"
        ) from error
    # A shortened copy has no published sum; a batch of full length that differs from the published one is
    # damaged.
    if len(labels) == _WHOLE_BATCH and hashlib.md5(content, usedforsecurity=False).hexdigest() != published_md5:
        raise InputError(f"{path} must have the MD5 sum {published_md5}, and has not: unpack {URL} again")
    return images, labels


def _checked(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an unpickled batch, or a ValueError that says what is wrong with it."""
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError("no dictionary with data and labels")
    data, labels = batch[b"data"], np.asarray(batch[b"labels"])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_VALUES,):
        raise ValueError(f"data is not an array of bytes with {_VALUES} columns")
    if labels.dtype != np.int64 or labels.shape != data.shape[:1] or len(labels) == 0:
        raise ValueError(f"not one whole number for each of the {len(data)} images in labels")
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"labels outside 0 ... {len(CLASS_NAMES) - 1}")
    return data.reshape(-1, 3, 32, 32), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and NumPy arrays; every other global name is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data do not need")
        return _ALLOWED[module, name]

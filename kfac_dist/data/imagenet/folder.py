"""An ImageFolder tree: `train/<class>/<image>` and `val/<class>/<image>`, sub-folders of a class included."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kfac_dist.errors import InputError

logger = logging.getLogger(__name__)

# Those of torchvision's ImageFolder.
_ENDINGS = (b".jpg", b".jpeg", b".png", b".bmp", b".ppm", b".pgm", b".webp", b".tif", b".tiff")
_LAYOUT = "the layout is train/<class>/<image> and val/<class>/<image>"


@dataclass(frozen=True)
class ImageList:
    """The images of one split, in the order of their classes and names.

    Attributes:
        folder: The split's folder.
        class_names: Names of the classes; a label is an index into them.
        names: (N,) bytes, the paths below the split's folder; an array, because a million strings are many times
            as large.
        labels: (N,) int64.
    """

    folder: Path
    class_names: tuple[str, ...]
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """File of an image."""
        return self.folder / os.fsdecode(bytes(self.names[index]))

    def evenly(self, limit: int | None) -> ImageList:
        """`limit` images evenly over the list, so that each class keeps its share; all for None."""
        if limit is None:
            return self
        kept = (2 * np.arange(limit) + 1) * len(self) // (2 * limit)  # the middles of equal pieces
        return replace(self, names=self.names[kept], labels=self.labels[kept])

    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of all files: another if an image was added, removed or resized."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            digest.update(b"%s\0%d\0" % (bytes(name), self.path(index).stat().st_size))
        return digest.hexdigest()


def list_images(root: Path, split: str, known_classes: tuple[str, ...] | None = None) -> ImageList:
    """List one split; what of it is left out is logged.

    Args:
        root: The tree.
        split: `train` or `val`.
        known_classes: The training classes, which give the labels; None where this split defines them.

    Raises:
        InputError: If the folder, its classes or their images are missing, or a class is not a known one.
    """
    folder = root / split
    if not folder.is_dir():
        raise InputError(f"data.root must contain the folder {split}, got {root}, which does not: {_LAYOUT}")
    try:
        return _list_folder(folder, known_classes)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _list_folder(folder: Path, known_classes: tuple[str, ...] | None) -> ImageList:
    found, outside = _classes_in(folder)
    classes = known_classes or tuple(found)
    _check_classes(folder, found, classes)
    number = {name: label for label, name in enumerate(classes)}
    names: list[bytes] = []
    labels: list[int] = []
    empty: list[str] = []
    left_out: list[bytes] = []
    for name in found:
        before = len(names)
        _walk(os.fsencode(folder), os.fsencode(name), names, left_out)
        labels += [number[name]] * (len(names) - before)
        if len(names) == before:
            empty.append(name)
    if empty:
        raise InputError(
            f"{folder}: no images in the class folder{'' if len(empty) == 1 else 's'} {_some(empty)}: fill or "
            f"delete {'it' if len(empty) == 1 else 'them'} ({_LAYOUT}; known endings: "
            f"{b' '.join(_ENDINGS).decode()})"
        )
    _log_what_is_left_out(folder, outside, left_out)
    missing = sorted(set(classes) - set(found))
    if missing:
        logger.warning("%s: no images of %d of the training classes: %s", folder, len(missing), _some(missing))
    return ImageList(folder, classes, np.array(names), np.array(labels, dtype=np.int64))


def _classes_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of the files beside them."""
    with os.scandir(folder) as entries:
        kinds = [(entry.name, entry.is_dir()) for entry in entries]
    return sorted(name for name, is_dir in kinds if is_dir), sorted(name for name, is_dir in kinds if not is_dir)


def _walk(
    folder: bytes, below: bytes, names: list[bytes], left_out: list[bytes], ancestors: tuple[bytes, ...] = ()
) -> None:
    """Append the images in `folder/below` and its sub-folders to `names`, other files to `left_out`.

    The order is by name, a folder's own images before those of its sub-folders. Links are followed.
    """
    path = os.path.join(folder, below)
    real = os.path.realpath(path)
    if real in ancestors:
        raise InputError(f"{os.fsdecode(path)} is a link to a folder around it: delete it")
    folders = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = below + b"/" + entry.name
            if entry.is_dir():
                folders.append(name)
            else:
                (names if entry.name.lower().endswith(_ENDINGS) else left_out).append(name)
    for name in folders:
        _walk(folder, name, names, left_out, (*ancestors, real))


def _check_classes(folder: Path, found: list[str], classes: tuple[str, ...]) -> None:
    if not found:
        raise InputError(f"{folder} holds no class folders: {_LAYOUT}")
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise InputError(
            f"{folder}: {_some(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the "
            f"training data ({len(classes)} classes in {folder.with_name('train')}): both splits must name classes "
            "alike"
        )


def _log_what_is_left_out(folder: Path, outside: list[str], left_out: list[bytes]) -> None:
    if outside:
        logger.warning("%s: left out what lies in no class folder: %s", folder, _count(outside))
    if left_out:
        endings, files = b" ".join(_ENDINGS).decode(), [os.fsdecode(name) for name in left_out]
        logger.warning("%s: left out what does not end in one of %s: %s", folder, endings, _count(files))


def _count(files: Sequence[str]) -> str:
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'} ({_some(files)})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

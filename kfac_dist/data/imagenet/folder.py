"""An ImageFolder tree: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kfac_dist.errors import InputError

_ENDINGS = (b".jpg", b".jpeg", b".png", b".bmp", b".ppm", b".pgm", b".webp", b".tif", b".tiff")
_LAYOUT = "the layout is train/<class>/<image> and val/<class>/<image>"


@dataclass(frozen=True)
class ImageList:
    """The images of one split, in the order of their classes and names.

    Attributes:
        folder: The split's folder.
        class_names: Names of the classes; a label is an index into them.
        names: (N,) bytes, `<class>/<image>`; an array, because a million strings are many times as large.
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
    """List one split.

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
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        raise InputError(f"{folder} holds no class folders: {_LAYOUT}")
    classes = known_classes or tuple(found)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise InputError(
            f"{folder}: {_some(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the "
            f"training data ({len(classes)} classes in {root / 'train'}): both splits must name classes alike"
        )
    number = {name: label for label, name in enumerate(classes)}
    names: list[bytes] = []
    labels: list[int] = []
    empty = []
    for name in found:
        images = _images_in(folder / name)
        names += [os.fsencode(name) + b"/" + path for path in images]
        labels += [number[name]] * len(images)
        if not images:
            empty.append(name)
    if empty:
        raise InputError(
            f"{folder}: no images in the class folder{'' if len(empty) == 1 else 's'} {_some(empty)}: fill or "
            f"delete {'it' if len(empty) == 1 else 'them'} ({_LAYOUT}; known endings: "
            f"{b' '.join(_ENDINGS).decode()})"
        )
    return ImageList(folder, classes, np.array(names), np.array(labels, dtype=np.int64))


def _images_in(folder: Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(_ENDINGS))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

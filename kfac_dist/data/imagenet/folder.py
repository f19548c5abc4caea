"""An ImageFolder tree: `train/<class>/<image>` and `val/<class>/<image>`, sub-folders of a class included."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kfac_dist.communicator import Communicator
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.data.imagenet.listing import ENDINGS, Listing, classes_in, some
from kfac_dist.data.imagenet.listing_cache import find_listing
from kfac_dist.errors import InputError

logger = logging.getLogger(__name__)

_ALONE = LocalCommunicator()
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


def list_images(
    root: Path, split: str, known_classes: tuple[str, ...] | None = None, communicator: Communicator = _ALONE
) -> ImageList:
    """List one split, on rank 0, for all ranks; what of it is left out is logged. Collective.

    A thousand ranks that walk over a million files each would keep a shared file system busy for long. The other ranks
    only look whether they see the same folders.

    Args:
        root: The tree.
        split: `train` or `val`.
        known_classes: The training classes, which give the labels; None where this split defines them.
        communicator: Of the ranks.

    Raises:
        AgreedInputError: If the folder, its classes or their images are missing, or a class is not a known one; on
            every rank.
    """
    folder = root / split
    content = b""
    with communicator.raise_on_all_ranks():
        if not folder.is_dir():
            raise InputError(f"data.root must contain the folder {split}, got {root}, which does not: {_LAYOUT}")
        if communicator.is_main:
            try:
                content = find_listing(folder).to_bytes()
            except OSError as error:
                raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    listing = Listing.from_bytes(communicator.broadcast_bytes(content))
    with communicator.raise_on_all_ranks():
        images = _labelled(folder, listing, known_classes)
        if not communicator.is_main:
            _check_is_here(images, listing)
    return images


def _labelled(folder: Path, listing: Listing, known_classes: tuple[str, ...] | None) -> ImageList:
    found = listing.class_names
    classes = known_classes or found
    _check_classes(folder, found, classes)
    empty = [name for name, count in zip(found, listing.counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"{folder}: no images in the class folder{'' if len(empty) == 1 else 's'} {some(empty)}: fill or "
            f"delete {'it' if len(empty) == 1 else 'them'} ({_LAYOUT}; known endings: "
            f"{b' '.join(ENDINGS).decode()})"
        )
    for text in listing.left_out:
        logger.warning("%s: %s", folder, text)
    missing = sorted(set(classes) - set(found))
    if missing:
        logger.warning("%s: no images of %d of the training classes: %s", folder, len(missing), some(missing))
    number = {name: label for label, name in enumerate(classes)}
    labels = np.repeat(np.array([number[name] for name in found], dtype=np.int64), listing.counts)
    return ImageList(folder, classes, listing.names, labels)


def _check_is_here(images: ImageList, listing: Listing) -> None:
    """Refuse, as far as a few looks tell, that this host holds other data than rank 0's."""
    lacking = sorted(set(listing.class_names).symmetric_difference(classes_in(images.folder)[0]))
    lacking += [str(path) for path in (images.path(0), images.path(len(images) - 1)) if not path.is_file()]
    if lacking:
        raise InputError(
            f"all ranks must have the same data, but {images.folder} differs from rank 0's in {some(lacking)}; "
            "every host must hold the same data: compare the folders"
        )


def _check_classes(folder: Path, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    if not found:
        raise InputError(f"{folder} holds no class folders: {_LAYOUT}")
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise InputError(
            f"{folder}: {some(unknown)} {'is no class' if len(unknown) == 1 else 'are no classes'} of the "
            f"training data ({len(classes)} classes in {folder.with_name('train')}): both splits must name classes "
            "alike"
        )

"""What lies in a split's folder: found by walking over it, and carried to other ranks or into a file as bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfac_dist.errors import InputError

# Those of torchvision's ImageFolder.
ENDINGS = (b".jpg", b".jpeg", b".png", b".bmp", b".ppm", b".pgm", b".webp", b".tif", b".tiff")


@dataclass(frozen=True)
class Listing:
    """The class folders and images of a split.

    Attributes:
        class_names: The class folders, sorted.
        counts: Number of images in each, sub-folders included; the same length.
        names: (Σ counts,) bytes, paths below the split's folder, class after class.
        left_out: What the log should say of other files.
        folders: Of each folder that was walked over, the split's included: the path below the split's folder, when it
            was modified and changed, both in ns, and its size. A file that is added or removed changes them; on a file
            system that keeps no time of a change, as squashfs, maybe the size alone.
        dangling: Of each link that led nowhere and has no image's name: its path below the split's folder. Once its
            target is there, a disk that was not mounted say, there is more to list.
    """

    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    names: np.ndarray
    left_out: tuple[str, ...]
    folders: tuple[tuple[str, int, int, int], ...]
    dangling: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """A line of JSON, then all names, each padded to the longest."""
        facts = [self.class_names, self.counts, self.names.itemsize, self.left_out, self.folders, self.dangling]
        return json.dumps(facts).encode() + b"\n" + self.names.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Listing:
        """The inverse of `to_bytes`."""
        end = content.index(b"\n")
        class_names, counts, width, left_out, folders, dangling = json.loads(content[:end])
        names = np.frombuffer(content, dtype=f"S{width}", offset=end + 1)
        folders = tuple(map(tuple, folders))
        return cls(tuple(class_names), tuple(counts), names, tuple(left_out), folders, tuple(dangling))


def walk(folder: Path) -> Listing:
    """List a split's folder.

    Raises:
        InputError: If a link leads to a folder around it.
        OSError: If a folder cannot be read.
    """
    walked = _Walk(os.fsencode(folder))
    times = walked.times_of(b"")
    class_names, beside = classes_in(folder)
    outside = [name for name in beside if not _is_hidden(name)]
    counts = []
    for name in class_names:
        before = len(walked.names)
        walked.collect(os.fsencode(name))
        counts.append(len(walked.names) - before)
    left_out = []
    if outside:
        left_out.append(f"left out what lies in no class folder: {_count(outside)}")
    if walked.others:
        endings, files = b" ".join(ENDINGS).decode(), [os.fsdecode(name) for name in walked.others]
        left_out.append(f"left out what does not end in one of {endings}: {_count(files)}")
    hidden = [*filter(_is_hidden, beside), *map(os.fsdecode, walked.hidden)]
    if hidden:
        left_out.append(f"left out names that begin with a dot: {len(hidden):,} ({some(hidden)})")
    names = np.array(walked.names, dtype=None if walked.names else "S1")
    dangling = [*(name for name in outside if not (folder / name).exists()), *walked.dangling]
    return Listing(tuple(class_names), tuple(counts), names, tuple(left_out), (times, *walked.folders), tuple(dangling))


def classes_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of all else that lies beside them, both sorted."""
    with os.scandir(folder) as entries:
        kinds = [(entry.name, entry.is_dir() and not _is_hidden(entry.name)) for entry in entries]
    return sorted(name for name, is_dir in kinds if is_dir), sorted(name for name, is_dir in kinds if not is_dir)


def _is_hidden(name: str) -> bool:
    """As .ipynb_checkpoints, which holds copies, .DS_Store, and the ._* that macOS leaves, with an image's ending."""
    return name.startswith(".")


class _Walk:
    """Collects images, other files, hidden names and folders below a split's folder."""

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        self.names: list[bytes] = []
        self.others: list[bytes] = []
        self.hidden: list[bytes] = []
        self.dangling: list[str] = []
        self.folders: list[tuple[str, int, int, int]] = []

    def times_of(self, below: bytes) -> tuple[str, int, int, int]:
        status = os.stat(os.path.join(self.folder, below))
        return os.fsdecode(below), status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def collect(self, below: bytes, ancestors: tuple[bytes, ...] = ()) -> None:
        """Add what lies in `below` and its sub-folders.

        The order is by name, a folder's own images before those of its sub-folders. Links are followed.
        """
        path = os.path.join(self.folder, below)
        real = os.path.realpath(path)
        if real in ancestors:
            raise InputError(f"{os.fsdecode(path)} is a link to a folder around it: delete it")
        self.folders.append(self.times_of(below))  # before it is read: what comes later is noticed
        folders = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = below + b"/" + entry.name
                if entry.name.startswith(b"."):
                    self.hidden.append(name)
                elif entry.is_dir():
                    folders.append(name)
                elif entry.name.lower().endswith(ENDINGS):
                    self.names.append(name)
                else:
                    self.others.append(name)
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        self.dangling.append(os.fsdecode(name))
        for name in folders:
            self.collect(name, (*ancestors, real))


def _count(files: Sequence[str]) -> str:
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'} ({some(files)})"


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

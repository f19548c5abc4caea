"""The folder that holds a run's checkpoints: each appears there whole, by one rename, or not at all."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kfac_dist.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest
from kfac_dist.checkpoints.shard import sync_folder
from kfac_dist.errors import InputError

FOLDER = "checkpoints"
_COMPLETE = re.compile(r"iteration-(\d{8,})")
_UNFINISHED = (".saving-", ".deleting-")
_ASIDE = "unused-"


class CheckpointStore:
    """Checkpoints of one run, `<run>/checkpoints/iteration-<number>`."""

    def __init__(self, run: Path) -> None:
        """Of this run's folder; nothing is created."""
        self.folder = run / FOLDER

    def path_of(self, iteration: int) -> Path:
        """Where the checkpoint before an iteration is, or will be."""
        return self.folder / f"iteration-{iteration:08d}"

    def unfinished(self, iteration: int, token: str) -> Path:
        """Where a checkpoint is written until it is whole.

        Args:
            iteration: The next one.
            token: What no other attempt has.
        """
        return self.folder / f".saving-{iteration:08d}-{token}"

    def commit(self, unfinished: Path, manifest: Manifest) -> Path:
        """Write the manifest and put the checkpoint in its place.

        Raises:
            OSError: If that fails; nothing has changed then but what lies in `unfinished`.
        """
        path = unfinished / MANIFEST_FILE
        with path.open("x", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(unfinished)
        place = self.path_of(manifest.iteration)
        if place.exists():  # of a run that was resumed from an older one: this one is as good, and newer
            self._remove(place)
        unfinished.rename(place)
        sync_folder(self.folder)
        return place

    def newest_first(self) -> list[Path]:
        """Folders of the checkpoints that were committed."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read ({error.strerror})") from error
        found = [(int(match[1]), name) for name in names if (match := _COMPLETE.fullmatch(name))]
        return [self.folder / name for _, name in sorted(found, reverse=True)]

    def prune(self, keep: int, keep_best: bool) -> None:
        """Delete all but the newest, and the best by top-1; and what was left unfinished.

        Args:
            keep: How many of the newest stay, >= 1.
            keep_best: Whether the one of the best evaluation stays besides.
        """
        complete = self.newest_first()
        kept = set(complete[:keep])
        if keep_best:
            rated = [(top1, path) for path in complete if (top1 := _top1(path)) is not None]
            kept |= {max(rated)[1]} if rated else set()
        for path in complete:
            if path not in kept:
                self._remove(path)
        self.discard_unfinished()

    def set_aside_after(self, iteration: int) -> list[Path]:
        """Rename the checkpoints of later iterations: the run goes on from this one, and they are not of its future.

        Returns:
            Where they are now; nothing but the user deletes them.

        Raises:
            OSError: If one cannot be renamed.
        """
        moved = []
        for path in self.newest_first():
            if int(path.name.rpartition("-")[2]) <= iteration:
                break
            number, place = 1, self.folder / f"{_ASIDE}{path.name}"
            while place.exists():
                number += 1
                place = self.folder / f"{_ASIDE}{path.name}-{number}"
            path.rename(place)
            moved.append(place)
        return moved

    def discard_unfinished(self) -> None:
        """Delete what was left half written, by a crash or a full disk; call it while nothing is being written."""
        for path in self._left_over():
            shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Out of sight by one rename first, so that no half of it is ever seen."""
        doomed = self.folder / f".deleting-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _left_over(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from [path for path in self.folder.iterdir() if path.name.startswith(_UNFINISHED)]


def _top1(path: Path) -> float | None:
    try:
        return read_manifest(path).top1
    except InputError:
        return None

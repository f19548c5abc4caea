"""Listings of large folders, kept in the user's cache folder for the next run: ImageNet has 1.28 million files.

A kept listing counts as long as none of the folders that were walked over was modified or changed since, and no link
that led nowhere leads somewhere. A cache is a convenience: one that is missing, damaged or of another version is made
anew, and one that cannot be written is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from kfac_dist.data.imagenet.listing import Listing, walk

FEWEST_IMAGES = 10_000
"""Folders with fewer are listed in no time, and not kept."""

_QUIET_SECONDS = 10  # a folder modified twice within the file system's resolution of time would look unmodified
_VERSION = b"kfac_dist listing 3\n"


def find_listing(folder: Path) -> Listing:
    """What lies in a split's folder, from the cache where that is up to date.

    Raises:
        InputError: If a link leads to a folder around it.
        OSError: If a folder cannot be read.
    """
    listing = _read(folder)
    if listing is None:
        listing = walk(folder)
        newest = max(modified for _, modified, *_ in listing.folders)
        if len(listing.names) >= FEWEST_IMAGES and newest < time.time_ns() - _QUIET_SECONDS * 1_000_000_000:
            _write(folder, listing)
    return listing


def cache_file(folder: Path) -> Path:
    """Where the listing of a folder is kept.

    Raises:
        RuntimeError: If the user has no home folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
    return caches / "kfac_dist" / "listings" / name


def _read(folder: Path) -> Listing | None:
    try:
        content = cache_file(folder).read_bytes()
    except (OSError, RuntimeError):
        return None
    start = len(_VERSION) + hashlib.sha256().digest_size
    body = memoryview(content)[start:]
    if content[:start] != _VERSION + hashlib.sha256(body).digest():
        return None
    listing = Listing.from_bytes(bytes(body))
    try:
        for name, *known in listing.folders:
            status = os.stat(folder / name)
            if [status.st_mtime_ns, status.st_ctime_ns, status.st_size] != known:
                return None
    except OSError:
        return None
    return None if any((folder / name).exists() for name in listing.dangling) else listing


def _write(folder: Path, listing: Listing) -> None:
    """All of it or nothing: other jobs may read and write the same file."""
    body = listing.to_bytes()
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="unfinished-", delete=False) as file:
            try:
                file.write(_VERSION + hashlib.sha256(body).digest() + body)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

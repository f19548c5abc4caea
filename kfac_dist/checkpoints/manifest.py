"""What a checkpoint consists of: one JSON file with the record of each other file, and a checksum of its own."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kfac_dist.checkpoints.shard import FileRecord
from kfac_dist.errors import InputError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_LARGEST = 256 << 20  # bytes: a manifest of 100,000 ranks has 40 MB
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        iteration: The next one.
        num_ranks: How many wrote it.
        top1: Of the last evaluation before it, in percent; None before any.
        config: The run's resolved configuration, YAML.
        data: What the data set was found to be: sizes, by name.
        code_version: Of kfac_dist.
        created: Time, UTC, ISO 8601.
        files: Record of each file, by name.
    """

    iteration: int
    num_ranks: int
    top1: float | None
    config: str
    data: Mapping[str, Any]
    code_version: str
    created: str
    files: Mapping[str, FileRecord]

    def with_files(self, files: Mapping[str, FileRecord]) -> "Manifest":
        """This one with other records."""
        return replace(self, files=dict(files))

    def to_json(self) -> str:
        """As it stands in the file."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"sha256": _checksum(content), **content}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        InputError: If there is none, it is damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: must have at most {_LARGEST} bytes, got {path.stat().st_size}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: not JSON ({error})") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
        raise InputError(f"{path}: is damaged: its checksum does not fit its content")
    found = content.pop("format", None)
    if found != FORMAT:
        raise InputError(f"{path}: must be of format {FORMAT}, got {found}: it was written by another version")
    return _parse(path, content)


def _parse(path: Path, content: dict[str, Any]) -> Manifest:
    try:
        files = {str(name): FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: is not a manifest ({error})") from error
    # Whoever can write here can compute a checksum.
    fits = isinstance(manifest.iteration, int) and isinstance(manifest.num_ranks, int)
    fits &= isinstance(manifest.config, str) and isinstance(manifest.data, dict)
    fits &= isinstance(manifest.top1, float | int | None)
    for record in files.values():
        fits &= isinstance(record.size, int) and isinstance(record.sha256, str) and isinstance(record.items, list)
        fits &= all(isinstance(item, str) for item in record.items)
    if not fits:
        raise InputError(f"{path}: is not a manifest: a value in it is of another type")
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise InputError(f"{path}: file names must be plain, got {name!r:.120}")
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()

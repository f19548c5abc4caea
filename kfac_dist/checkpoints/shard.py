"""One file of a checkpoint: named items, each a nested state, as safetensors; its size and SHA-256."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kfac_dist.errors import InputError
from kfac_dist.tensors.nested_state import flatten, unflatten

_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file.

    Attributes:
        size: Bytes.
        sha256: Of the content, in hexadecimal.
        items: Names of the items in it.
    """

    size: int
    sha256: str
    items: Sequence[str]


def write_shard(path: Path, items: Mapping[str, Any]) -> FileRecord:
    """Write items and have them on the disk.

    Args:
        path: A new file.
        items: Nested states by name, with tensors on the CPU.

    Raises:
        OSError: If it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    trees = {}
    for name, state in items.items():
        flat, trees[name] = flatten(state)
        tensors |= {f"{name}:{key}": tensor.contiguous() for key, tensor in flat.items()}
    return _write(path, tensors, {"items": json.dumps(trees)}, list(items))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write plain tensors by name, such as a network's weights, for any reader of safetensors."""
    return _write(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}, [])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        InputError: If it is none.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file is no mapping


class ShardReader:
    """Items of a shard, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Look at what there is.

        Raises:
            InputError: If it is no shard.
        """
        self._path = path
        with _opened(path) as file:
            metadata = file.metadata() or {}
        try:
            self._trees = json.loads(metadata["items"])
        except (KeyError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: must be a shard of a checkpoint, but lists no items") from error
        if not isinstance(self._trees, dict):
            raise InputError(f"{path}: must be a shard of a checkpoint, but its list of items is none")

    def read(self, name: str) -> Any:
        """An item as it was written, its tensors on the CPU.

        Raises:
            InputError: If it is not there, or damaged.
        """
        if name not in self._trees:
            raise InputError(f"{self._path}: has no item {name!r}")
        with _opened(self._path) as file:
            return unflatten(_ItemTensors(file, name), self._trees[name])


class _ItemTensors(Mapping[str, Tensor]):
    """Tensors of one item in an open file, each read when it is asked for."""

    def __init__(self, file: Any, item: str) -> None:
        self._file = file
        prefix = f"{item}:"
        self._names = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._prefix + name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def record_of(path: Path, items: Sequence[str] = ()) -> FileRecord:
    """Size and checksum of a file as it is on the disk."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest(), list(items))


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with what its manifest says.

    Raises:
        InputError: If it is missing, not a plain file, or differs.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path}: must be a file, and is missing or something else")
        size = path.stat().st_size
        if size != record.size:
            raise InputError(f"{path}: must have {record.size} bytes, as its manifest says, got {size}")
        if record_of(path).sha256 != record.sha256:
            raise InputError(f"{path}: is damaged: its SHA-256 is not the one in its manifest")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def sync_folder(folder: Path) -> None:
    """Have the folder's entries, such as renames, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], items: list[str]) -> FileRecord:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it wraps what the operating system said
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o644)  # the library lets nobody else read it
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return record_of(path, items)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open` whose errors name the file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: must be a readable safetensors file ({error})") from error

"""Rules on folders: where runs are written, where data is read, and shared memory."""

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.doctor.findings import Finding, format_ranks
from kfac_dist.doctor.ranks import RankFacts

_NETWORK_TYPES = re.compile(r"nfs|nfs4|cifs|smb3?|lustre|gpfs|beegfs|ceph|glusterfs|pvfs2|afs|9p|virtiofs|fuse\..*")
_MEMORY_TYPES = ("tmpfs", "ramfs")
_LITTLE_SPACE = {"error": 100 << 20, "warning": 5 << 30}
_LITTLE_SHARED_MEMORY = 512 << 20
_WRITTEN_BYTES = 4 << 20
_READ_BYTES = 16 << 20
_SECONDS = 1.0
_SLOW_MB_PER_S = 5.0


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its mount point and its type, such as ext4."""

    point: str
    kind: str


def find_mount(path: str, mounts: str) -> Mount | None:
    """The file system that a path lies on.

    Args:
        path: Absolute, without symbolic links.
        mounts: Text of /proc/mounts.
    """
    best = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        inside = point == "/" or path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):  # of two on one point the later covers the other
            best = Mount(point, fields[2])
    return best


def existing_part(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists: where it would be made."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


# Output -------------------------------------------------------------------------------------------------


def write_small_file(folder: Path, num_bytes: int = _WRITTEN_BYTES) -> float:
    """Write a file and wait until it is on the disk; it is gone afterwards.

    Returns:
        MB/s. Writing stops after about a second.
    """
    start = time.perf_counter()
    written = 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kfac_dist-doctor-") as file:
        while written < num_bytes and (written == 0 or time.perf_counter() - start < _SECONDS):
            file.write(os.urandom(min(1 << 20, num_bytes)))
            file.flush()
            os.fsync(file.fileno())
            written += min(1 << 20, num_bytes)
    return written / 1e6 / (time.perf_counter() - start)


def not_writable(path: Path, error: OSError) -> Finding:
    """A folder in which nothing can be written."""
    reason = error.strerror or str(error)
    remedy = "choose another folder (--output DIR, run.output_dir), or change its owner or mode (chown, chmod)"
    return Finding("output", "error", f"{path} cannot be written: {reason}", remedy)


def check_space(path: Path, free_bytes: int) -> Finding:
    """Room for metrics, events and checkpoints."""
    found = f"{_size(free_bytes)} free for {path}"
    remedy = "delete old runs, or choose another folder: run.output_dir"
    if free_bytes < _LITTLE_SPACE["error"]:
        return Finding("output space", "error", found, remedy)
    if free_bytes < _LITTLE_SPACE["warning"]:
        return Finding("output space", "warning", f"{found}: few checkpoints fit", remedy)
    return Finding("output space", "ok", found)


def check_output_kind(path: Path, mount: Mount | None) -> Finding:
    """The kind of file system that runs are written to."""
    if mount is None:
        return Finding("output", "ok", f"{path} can be written")
    found = f"{path} can be written, {mount.kind} on {mount.point}"
    if mount.kind in _MEMORY_TYPES:
        remedy = "choose a folder on a disk: run.output_dir"
        return Finding("output", "warning", f"{found}: in memory, gone after a reboot", remedy)
    if mount.kind == "overlay":
        remedy = "mount a folder of the host: docker run -v /data/runs:/data/runs, run.output_dir=/data/runs"
        return Finding("output", "note", f"{found}: inside the container, gone with it", remedy)
    return Finding("output", "ok", found + (", over the network" if is_network(mount) else ""))


def is_network(mount: Mount) -> bool:
    """Whether other hosts may see the same files."""
    return _NETWORK_TYPES.fullmatch(mount.kind) is not None


def make_marker(folder: Path) -> str:
    """Make an empty file for other ranks to find."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=".kfac_dist-doctor-marker-")
    os.close(handle)
    return path


def wait_for_marker(path: str, seconds: float = _SECONDS) -> bool:
    """Whether the file that another rank made is seen; a network may take a moment."""
    deadline = time.perf_counter() + seconds
    while not os.path.exists(path):
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.05)
    return True


def check_marker(path: str, seen: Sequence[bool]) -> list[Finding]:
    """Whether all ranks see what rank 0 writes.

    Args:
        path: The marker; empty if rank 0 could make none.
        seen: For each rank.
    """
    if not path:
        return []  # the folder cannot be written, which is a finding already
    folder = os.path.dirname(path)
    blind = tuple(rank for rank, sees in enumerate(seen) if not sees)
    if not blind:
        return [Finding("output shared", "ok", f"every rank sees what rank 0 writes in {folder}")] if seen[1:] else []
    found = f"a file that rank 0 wrote in {folder} is not seen: the hosts have folders of their own"
    remedy = (
        "choose a folder that all hosts mount (NFS, Lustre): run.output_dir; checkpoints must be found on every rank"
    )
    return [Finding("output shared", "warning", found, remedy, blind)]


# Data ---------------------------------------------------------------------------------------------------


def read_samples(folder: Path) -> tuple[int, float]:
    """Read files of a folder and those below, for about a second at most.

    Returns:
        Bytes read, and MB/s.

    Raises:
        OSError: If a folder or a file cannot be read.
    """
    start = time.perf_counter()
    num_read = 0
    for path in _files_below(folder):
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                num_read += len(chunk)
                if num_read >= _READ_BYTES or time.perf_counter() - start > _SECONDS:
                    return num_read, num_read / 1e6 / (time.perf_counter() - start)
    return num_read, num_read / 1e6 / max(time.perf_counter() - start, 1e-9)


def _files_below(folder: Path) -> Iterator[str]:
    """Files in the order of the folders' own lists: sorting ImageNet's takes too long for a look."""
    folders = [str(folder)]
    deadline = time.perf_counter() + _SECONDS  # links may lead in circles
    while folders and time.perf_counter() < deadline:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    if entry.name != "lost+found":  # at the root of a disk, and root's alone
                        folders.append(entry.path)
                elif entry.is_file():
                    yield entry.path


def not_readable(path: Path, error: OSError) -> Finding:
    """Data that is not there or may not be read."""
    reason = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename and str(error.filename) != str(path) else ""
    remedy = "name the folder that holds the data set on every host (--data DIR, data.root), mount it, or chmod -R a+rX"
    return Finding("data", "error", f"{path} cannot be read: {where}{reason}", remedy)


def check_data(path: Path, num_bytes: int, mount: Mount | None) -> Finding:
    """Data that could be read."""
    if num_bytes == 0:
        return Finding("data", "error", f"{path} holds no data", "name the folder that holds the data set: --data DIR")
    if mount is not None and is_network(mount):
        remedy = "copy the data set to each host's own disk if the loader turns out to be the bottleneck"
        return Finding("data", "note", f"{path} is read over the network ({mount.kind} on {mount.point})", remedy)
    return Finding("data", "ok", f"{path} is readable" + (f", {mount.kind} on {mount.point}" if mount else ""))


# All ranks' figures -------------------------------------------------------------------------------------


def check_speeds(facts: Sequence[RankFacts]) -> list[Finding]:
    """Measured rates, with the slowest rank."""
    findings = []
    writing = [rank_facts.output_mb_per_s for rank_facts in facts]
    reading = [rank_facts.data_mb_per_s for rank_facts in facts]
    if any(rate is not None for rate in writing):
        remedy = "choose a faster disk for run.output_dir, or write checkpoints less often"
        findings.append(_speed("output speed", "written and synchronised", writing, remedy))
    if any(rate is not None for rate in reading):
        remedy = "copy the data set to each host's own disk"
        findings.append(_speed("data speed", "a rank, read (perhaps from the cache)", reading, remedy))
    return findings


def _speed(name: str, how: str, rates: Sequence[float | None], remedy: str) -> Finding:
    measured = {rank: rate for rank, rate in enumerate(rates) if rate is not None}
    slowest = min(measured, key=lambda rank: measured[rank])
    found = f"{measured[slowest]:.0f} MB/s {how}"
    if len(measured) > 1:
        fastest = max(measured.values())
        found = f"{measured[slowest]:.0f} ({format_ranks([slowest])}) to {fastest:.0f} MB/s {how}"
    if measured[slowest] < _SLOW_MB_PER_S:
        return Finding(name, "note", f"{found}: slow", remedy)
    return Finding(name, "ok", found)


# Shared memory ------------------------------------------------------------------------------------------


def check_shared_memory(total_bytes: int | None, free_bytes: int) -> Finding:
    """/dev/shm, through which MPI and loaders talk on one host.

    Args:
        total_bytes: Its size, None where there is none.
        free_bytes: What is left of it.
    """
    remedy = "docker run --shm-size=8g, or --ipc=host; on a host, mount -o remount,size=8G /dev/shm"
    if total_bytes is None:
        return Finding("shared memory", "warning", "there is no /dev/shm", remedy)
    found = f"/dev/shm has {_size(total_bytes)}, {_size(free_bytes)} free"
    if total_bytes < _LITTLE_SHARED_MEMORY:
        return Finding("shared memory", "warning", f"{found}: MPI or loaders may die with a bus error", remedy)
    if free_bytes < _LITTLE_SHARED_MEMORY:
        cleanup = "delete what ended jobs left in /dev/shm (ls -lt /dev/shm), or enlarge it"
        return Finding("shared memory", "warning", f"{found}: MPI or loaders may die with a bus error", cleanup)
    return Finding("shared memory", "ok", found)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / 2**20:.0f} MiB"

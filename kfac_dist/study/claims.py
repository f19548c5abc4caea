"""Who trains a trial: claims that one worker at a time can make, and that end when it dies.

A claim is the folder ``claims/N`` of the trial, made by `mkdir`, which succeeds for one process only. The holder
touches its file ``owner.json`` again and again. Whoever finds the last claim given back, or its holder dead, makes
claim N + 1: nothing is ever renamed or deleted, so that no two workers can both believe that they hold the last one.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OWNER, _RELEASED = "owner.json", "released"


def this_machine() -> str:
    """Tells machines apart, and containers that cannot see each other's processes."""
    parts = [socket.gethostname()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        try:
            parts.append(path.read_text().strip() if path.name == "boot_id" else os.readlink(path))
        except OSError:
            continue
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine was started, in ticks since boot; empty if there is none, or it cannot be seen."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else rest[18]


class Claim:
    """A trial taken by this process, from `claim_trial`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name)

    @property
    def is_last(self) -> bool:
        """Whether nobody else has taken the trial since."""
        return not (self.folder.parent / str(self.number + 1)).exists()

    def touch(self) -> None:
        """Tell the others that this worker lives."""
        os.utime(self.folder / _OWNER)

    def release(self) -> None:
        """Give the trial back, unfinished."""
        (self.folder / _RELEASED).touch()


def claim_trial(trial: Path, lease_seconds: float) -> Claim | None:
    """Take a trial, if nobody has it or its last holder is dead.

    Args:
        trial: Its folder, which need not be there.
        lease_seconds: A holder on another machine that has not touched its claim for so long is dead; one on this
            machine is where its process is gone.
    """
    claims = trial / "claims"
    last = _last_claim(claims)
    if last is not None and _is_held(last, lease_seconds):
        return None
    folder = claims / str(0 if last is None else int(last.name) + 1)
    claims.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return None
    owner = {"machine": this_machine(), "pid": os.getpid(), "started": _started(os.getpid())}
    temporary = folder / f".{_OWNER}"
    temporary.write_text(json.dumps(owner) + "\n", encoding="utf-8")
    temporary.rename(folder / _OWNER)
    return Claim(folder)


def is_claimed(trial: Path, lease_seconds: float) -> bool:
    """Whether a living worker has a trial."""
    last = _last_claim(trial / "claims")
    return last is not None and _is_held(last, lease_seconds)


def count_deaths(trial: Path) -> int:
    """How many workers left the trial without giving it back; the one who has it is counted, too."""
    return sum(not (claim / _RELEASED).exists() for claim in _all_claims(trial / "claims"))


def release_all(trial: Path) -> None:
    """Forget who left the trial: it may be taken again as if it were new."""
    for claim in _all_claims(trial / "claims"):
        Claim(claim).release()


def _all_claims(claims: Path) -> list[Path]:
    """In no order; without the marks of workers that ask for the time."""
    try:
        return [claims / name for name in os.listdir(claims) if name.isdigit()]
    except FileNotFoundError:
        return []


def _last_claim(claims: Path) -> Path | None:
    return max(_all_claims(claims), key=lambda claim: int(claim.name), default=None)


def _is_held(claim: Path, lease_seconds: float) -> bool:
    if (claim / _RELEASED).exists():
        return False
    try:
        owner: dict[str, Any] = json.loads((claim / _OWNER).read_text(encoding="utf-8"))
        touched = (claim / _OWNER).stat().st_mtime
    except (OSError, ValueError):  # it has just been made, or its maker died at once
        owner, touched = {}, claim.stat().st_mtime
    if owner.get("machine") == this_machine():
        started = _started(int(owner["pid"]))
        return bool(started) and started == owner["started"]
    return _now_at(claim.parent) - touched < lease_seconds


def _now_at(folder: Path) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    mark = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    try:
        mark.touch()
        now = mark.stat().st_mtime
        mark.unlink(missing_ok=True)
    except OSError:  # who may only read the study, or a full disk
        return time.time()
    return now


class Heartbeat:
    """A thread that touches a claim while it is entered, and sees whether it was lost or the worker's parent died.

    Attributes:
        is_lost: Whether another worker has taken the trial.
    """

    def __init__(self, claim: Claim, lease_seconds: float, parent: int, on_orphaned: Callable[[], None]) -> None:
        self._claim, self._interval = claim, min(lease_seconds / 5, 5.0)
        self._parent, self._on_orphaned = parent, on_orphaned
        self._ended = threading.Event()
        self.is_lost = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            if os.getppid() != self._parent:
                self._on_orphaned()
            try:
                self.is_lost = self.is_lost or not self._claim.is_last
                self._claim.touch()
            except OSError:  # a network's file system that is away for a moment
                continue

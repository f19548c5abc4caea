"""One job at a time in a run's folder: a lock that the system takes back when its holder dies."""

import errno
import fcntl
import logging
import os
import time
from pathlib import Path

from kfac_dist.errors import InputError

LOCK_FILE = ".lock"
_PATIENCE_SECONDS = 1.0  # for a job that only looks whether there is a checkpoint

logger = logging.getLogger(__name__)


class RunLock:
    """Held from the making until `release`, or until the process ends in whatever way."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Args:
            directory: The run's folder; it exists.

        Raises:
            InputError: If another process holds it, or nothing can be written there.
        """
        path = directory / LOCK_FILE
        try:
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{directory}: cannot be locked ({error.strerror}); choose a writable folder") from error
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._try(directory):
            if time.monotonic() > deadline:
                self.release()
                raise InputError(
                    f"{directory} is in use: another job trains this run. Wait for its end or stop it, or start a run "
                    "of its own, without --resume"
                )
            time.sleep(0.05)

    def release(self) -> None:
        """Give it back; may be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self, directory: Path) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            # A network's file system without locks; runs went on there without this, too.
            logger.warning("%s: its file system has no locks (%s); start no second job there", directory, error)
        return True

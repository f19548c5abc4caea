"""A run's log.txt: what rank 0's terminal shows, and the warnings of all ranks, each with time, rank and level."""

import faulthandler
import logging
import os
import sys
import tempfile
import traceback
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

LOG_FILE = "log.txt"
_MOST_HELD = 1000  # records before the run's folder is known

logger = logging.getLogger(__name__)


class RunLog(logging.Handler):
    """Appends to one file from all ranks, a record in one write; a rank opens it when it has something to say.

    Local and parallel file systems keep such writes whole and apart. NFS does not between hosts: there lines that two
    hosts write in the same moment may overwrite each other.
    """

    def __init__(self, rank: int) -> None:
        """Hold what comes until `open`.

        Args:
            rank: This rank; rank 0 records what it shows, others their warnings.
        """
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._rank = rank
        self._path: Path | None = None
        self._file: int | None = None
        self._held: deque[str] = deque(maxlen=_MOST_HELD)

    @classmethod
    def of_this_process(cls, rank: int) -> "RunLog":
        """One that gets all records while it is entered; rank 0 shows them on the terminal, others only errors."""
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
        if rank != 0:
            for handler in logging.getLogger().handlers:
                handler.setLevel(logging.ERROR)
        return cls(rank)

    def __enter__(self) -> "RunLog":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)
        self.close()

    def show(self, text: str, level: str = "INFO", stream: TextIO | None = None) -> None:
        """Print a line on rank 0, to standard output unless told otherwise, and record it."""
        if self._rank == 0:
            self.write(level, text)
            stream = stream or sys.stdout
            try:
                print(text, file=stream, flush=True)
            except OSError:  # a full disk; what stands in log.txt is not lost, and no reason for another exit code
                if self._file is None:
                    raise
                with open(os.devnull, "wb") as nowhere:  # else Python tries again at its end
                    os.dup2(nowhere.fileno(), stream.fileno())

    def exception(self) -> None:
        """Record the exception that is being handled; whoever ends the process prints it."""
        self.write("ERROR", traceback.format_exc().rstrip())

    def open(self, directory: Path) -> None:
        """From now on write to the log of this run's folder, first what came before."""
        self._path = directory / LOG_FILE
        while self._held:
            self._append(self._held.popleft())

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self.write(record.levelname, text)

    def write(self, level: str, text: str) -> None:
        """Record a text that did not come through `logging`."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._append(f"{time} rank {self._rank} {level} {text}\n")

    def write_with_stacks(self, level: str, text: str) -> None:
        """`write`, followed by the stacks of all threads; needs no thread but this one to run.

        They go through a file of their own, since they are written piece by piece, and those of several ranks that hang
        together would be mixed.
        """
        stacks = ""
        with suppress(OSError), tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace").rstrip()
        self.write(level, f"{text}\n{stacks}")

    def close(self) -> None:
        """Close the file; what comes later is held again."""
        self._path = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()

    def _opened(self) -> int | None:
        if self._file is None and self._path is not None:
            with suppress(OSError):  # a full disk, or a folder that this host does not see
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._file

    def _append(self, text: str) -> None:
        if self._path is None:
            self._held.append(text)
            return
        file = self._opened()
        if file is not None:
            with suppress(OSError):
                os.write(file, text.encode(errors="backslashreplace"))

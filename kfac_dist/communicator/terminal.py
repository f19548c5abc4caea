"""Standard output and error of a program that may outlive whoever reads them."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_LOST = (errno.EPIPE, errno.EIO)  # a pipe without a reader, as behind `| head`; a terminal that was closed


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Within, what is printed where nobody reads it any more goes nowhere, and the program goes on.

    So does what is printed where there never was a reader, as after a shell's `>&-`. A disk that is full is an error
    where results are printed, but not where messages are, which end nothing.
    """
    outer = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Outliving(sys.stdout or _nowhere(), _LOST))
    sys.stderr = cast(TextIO, _Outliving(sys.stderr or _nowhere(), tuple(errno.errorcode)))
    try:
        yield
    finally:
        streams, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), outer
        for stream in streams:
            stream.flush()  # now: at exit it would be too late to catch the error


def _nowhere() -> TextIO:
    """In place of a stream that is closed; it also takes the descriptor, into which libraries would print."""
    return open(os.devnull, "w", encoding="utf-8")  # to the end of the process, as threads and loggers may keep it


class _Outliving:
    """A text stream whose descriptor leads nowhere from the first of these errors on."""

    def __init__(self, stream: TextIO, lost_by: tuple[int, ...]) -> None:
        self._stream = stream
        self._lost_by = lost_by
        self._dropping = threading.RLock()  # a second thread would take nowhere for the reader

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:  # of a terminal that is not UTF-8; as Python does for messages
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            self._drop_pending()
            return
        if error.errno not in self._lost_by:
            raise error
        self._lead_nowhere()

    def _drop_pending(self) -> None:
        """The reader is slow, and misses this: Python 3.14 would keep it all, and fail to write it at the end."""
        with self._dropping:
            reader = os.dup(self._stream.fileno())
            try:
                self._lead_nowhere()
                self._stream.flush()
            finally:
                os.dup2(reader, self._stream.fileno())
                os.close(reader)

    def _lead_nowhere(self) -> None:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

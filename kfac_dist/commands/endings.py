"""Endings without a traceback: Ctrl-C, and output that nobody reads any more."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130  # as in `kfac_dist.communicator.launch`, which loads torch


@contextmanager
def interruptible() -> Iterator[None]:
    """While modules are imported, which takes seconds: Ctrl-C ends the process at once, with exit code 130.

    An exception would not do so reliably, since modules catch it while they try what they can import.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored, as by a shell's `&`
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def printing() -> Iterator[None]:
    """While text is printed: where nobody reads it any more, as behind `| head`, the rest goes nowhere.

    What is left undone within is left quietly; the program goes on.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now: at exit it would be too late to catch the error
    except BrokenPipeError:
        if not _has_lost_reader():  # it is of another pipe
            raise
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _has_lost_reader() -> bool:
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))

"""An ending without a traceback: Ctrl-C while modules are imported."""

import os
import signal
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

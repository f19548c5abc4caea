"""Signals that ask a run to stop in an orderly way: they only leave a wish, which all ranks then agree on."""

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """While it is entered, SIGUSR1, SIGTERM, SIGHUP and the first SIGINT are remembered; a second SIGINT interrupts.

    SIGHUP, which comes when a terminal closes, stays ignored where it is, as under nohup.

    Python runs the handler when the call that the main thread is in returns, such as a collective.

    Attributes:
        received: Name of the signal that came first; empty before any.
    """

    def __init__(self) -> None:
        """Handle nothing yet."""
        self.received = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

"""Ends a job that no longer gets anywhere, and says where each rank was.

Nobody but the rank itself sees where it hangs, and a rank that hangs stops all others in their next collective. So each
has a thread of its own that looks; after a time without progress it writes the rank's stacks, waits for the other
ranks to do the same, and aborts the job.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from kfac_dist.communicator.abort import EXIT_FAILED, abort
from kfac_dist.runs.log import RunLog
from kfac_dist.timing import StageTimer

_STDERR = 2
_ABORT_SECONDS = 10.0  # after them the process ends itself, whatever MPI does


class Watchdog:
    """Watches this rank while it is entered.

    Attributes:
        activity: What is done besides training, such as "evaluation"; free text.
    """

    def __init__(
        self,
        minutes: float | None,
        rank: int,
        timer: StageTimer,
        iteration: Callable[[], int],
        log: RunLog | None = None,
        end: Callable[[int], object] = abort,
    ) -> None:
        """Set up.

        Args:
            minutes: Without progress, until the job is ended; None never ends it.
            rank: This rank.
            timer: Of the stages; entering or leaving one is progress.
            iteration: Tells the iteration; another one is progress.
            log: The run's.
            end: Ends the job with an exit code.
        """
        self.activity = "training"
        self._limit = 60 * minutes if minutes is not None else None
        self._rank, self._timer, self._iteration, self._log, self._end = rank, timer, iteration, log, end
        self._beats = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Tell of progress that is neither an iteration nor a stage."""
        self._beats += 1

    def __enter__(self) -> "Watchdog":
        if self._limit is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._limit,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, limit: float) -> None:
        pause = min(limit / 20, 1.0)
        seen, stalled, looked = self._progress(), 0.0, time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            # A job that was suspended for an hour has not hung for an hour.
            stalled, looked = stalled + min(now - looked, 2 * pause), now
            if seen != (current := self._progress()):
                seen, stalled = current, 0.0
            elif stalled >= limit:
                self._tell(stalled)
                # Others may have begun to wait later, by what one rank takes for an iteration, and look later where
                # programs share the cores.
                if not self._over.wait(min(30.0, max(3.0, limit / 5))):
                    faulthandler.dump_traceback_later(_ABORT_SECONDS, exit=True, file=_STDERR)
                    self._end(EXIT_FAILED)
                return

    def _progress(self) -> tuple[int, int, int]:
        return self._iteration(), self._timer.num_changes, self._beats

    def _tell(self, stalled: float) -> None:
        text = (
            f"watchdog: rank {self._rank} has made no progress for {stalled:.0f} s (run.watchdog_minutes): "
            f"{self.activity}, iteration {self._iteration()}, stage {self._timer.current or 'none'}; the job ends. "
            "A rank that does not say this is dead or stopped. The stacks of this rank's threads:"
        )
        with suppress(OSError, ValueError):  # closed, full, or without a reader: the job is to end all the same
            os.write(_STDERR, f"{text}\n".encode(errors="backslashreplace"))
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        if self._log is not None:
            self._log.write_with_stacks("ERROR", text)

"""Progress of a run on stderr: a bar in a terminal, lines in a log; shown by rank 0."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from kfac_dist.errors import InputError

PROGRESS_VARIABLE = "KFAC_DIST_PROGRESS"


class Progress:
    """Progress of a run on stderr: a bar in a terminal, else a line now and then.

    mpirun hands stderr on through a pipe, and Open MPI's holds text back until its line ends, which a bar's never does:
    under mpirun there are lines. The environment variable KFAC_DIST_PROGRESS decides where it is set: ``bar``,
    ``lines`` or ``off``. Lines come every 5 % of the run, and after 5 seconds without one; as the run grows older these
    become a minute, so that a log of days stays short.

    Args:
        total: Iterations of the run.
        is_main: Whether this rank shows anything.
        stream: Where to write; stderr unless given.
        record: Is given every line, whatever is shown; on the main rank only.

    Raises:
        InputError: If KFAC_DIST_PROGRESS has another value.
    """

    _LINES = 20
    _QUIET_SECONDS = (5.0, 60.0)  # at first, and after ten minutes

    def __init__(
        self,
        total: int,
        is_main: bool,
        stream: TextIO | None = None,
        record: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        style = os.environ.get(PROGRESS_VARIABLE) or ("bar" if self._stream.isatty() else "lines")
        if style not in ("bar", "lines", "off"):
            raise InputError(f"{PROGRESS_VARIABLE} must be bar, lines or off, got {style!r}")
        self._style = style if is_main else "off"
        self._is_main = is_main
        self._total = total
        self._record = record
        self._done = self._begun_at = 0
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if self._style == "bar":
            self._bar = tqdm(total=total, file=self._stream, unit="it", dynamic_ncols=True)

    def update(self, epoch: float, loss: float, top1: float, images_per_second: float) -> None:
        """Count one iteration and show its figures (``top1`` in percent)."""
        self._done += 1
        figures = f"epoch {epoch:.2f}  loss {_loss_text(loss)}  top-1 {top1:.1f} %  {images_per_second:,.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        if self._is_main and self._line_is_due():
            elapsed = self._last_line - self._started
            remaining = elapsed / (self._done - self._begun_at) * (self._total - self._done)
            line = (
                f"{100 * self._done / self._total:3.0f} %  iteration {self._done}/{self._total}  {figures}  "
                f"elapsed {_clock_text(elapsed)}  remaining {_clock_text(remaining)}"
            )
            self._record(line)
            if self._style == "lines":
                self._print(line)

    def go_to(self, done: int) -> None:
        """So many iterations are done, whatever was counted; the time that remains is judged from here on."""
        self._done = self._begun_at = done
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.reset()
            self._bar.update(done)

    def say(self, text: str) -> None:
        """Write a line of its own, without breaking the bar; shown with any style, on the main rank."""
        if self._is_main:
            self._record(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._is_main:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        crossed = self._done * self._LINES // self._total > (self._done - 1) * self._LINES // self._total
        shortest, longest = self._QUIET_SECONDS
        quiet = min(max((now - self._started) / 10, shortest), longest)
        due = crossed or now - self._last_line >= quiet
        if due:
            self._last_line = now
        return due

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _loss_text(loss: float) -> str:
    return f"{loss:.4f}" if abs(loss) < 1e4 else f"{loss:.4g}"


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

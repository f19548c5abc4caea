"""Wall time of the stages of a training iteration, under the paper's names (Algorithm 1)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = (
    "data",
    "forward",
    "backward",
    "reduce_scatter",
    "inverse",
    "precondition",
    "all_gather",
    "update",
)
"""Every stage name; ``data`` is input and augmentation, the others are those of Algorithm 1."""


class StageTimer:
    """Seconds spent in each stage since the last :meth:`take`.

    Stages may nest: time belongs to the innermost open stage only, so the stages never count a second
    twice and sum to the wall time spent inside any of them.

    Callers only see :meth:`stage` and :meth:`take`, so another way to measure (events recorded on a GPU
    stream and resolved by ``take``) can replace the clock without a change to the code that is timed.

    Args:
        clock: Returns the current time in seconds; it must never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._open: list[str] = []
        self._charged_until = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of the ``with`` block to a stage, also when the block raises.

        Args:
            name: One of :data:`STAGES`.

        Raises:
            ValueError: If the name is none of :data:`STAGES`.
        """
        if name not in self._seconds:
            raise ValueError(f"unknown stage {name!r}: must be one of {', '.join(STAGES)}")
        self._charge_innermost()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge_innermost()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of every stage of :data:`STAGES`, in that order, and start again from zero.

        A stage that is still open is charged up to now and goes on counting.
        """
        self._charge_innermost()
        taken = self._seconds
        self._seconds = dict.fromkeys(STAGES, 0.0)
        return taken

    def _charge_innermost(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._charged_until
        self._charged_until = now

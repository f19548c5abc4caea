"""Time of the stages of a training iteration, under the paper's names (Algorithm 1).

On a CPU that is the host's clock. A GPU works after the host has told it to, so there its own clock is read, from
events that are recorded between the kernels of two stages; nobody waits for them until the seconds are asked for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

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


class Clock(Protocol):
    """Marks points in time, and tells later how far apart they lay."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another."""


class HostClock:
    """The host's clock."""

    def mark(self) -> float:
        """This moment."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Seconds from one mark to another."""
        return end - start


class CudaClock:
    """A GPU's clock: a mark is passed when all work queued before it on the GPU's current stream is done."""

    def __init__(self, device: torch.device) -> None:
        """Set the GPU, which need not be torch's current one; its stream is looked up at every mark."""
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """This place in the GPU's current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds from one mark to another; waits until the GPU has passed both."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class StageSeconds:
    """What a timer recorded, to be read later."""

    def __init__(self, clock: Clock, spans: list[tuple[str, Any, Any]]) -> None:
        """Hold (stage, start mark, end mark) each."""
        self._clock = clock
        self._spans = spans

    def read(self) -> dict[str, float]:
        """Seconds of every stage of :data:`STAGES`, in that order; waits for the clock where it must."""
        seconds = dict.fromkeys(STAGES, 0.0)
        for stage, start, end in self._spans:
            seconds[stage] += self._clock.seconds(start, end)
        return seconds


class StageTimer:
    """Seconds spent in each stage since the last :meth:`snapshot`.

    Stages may nest: time belongs to the innermost open stage only, so the stages never count a second
    twice and sum to the wall time spent inside any of them.

    Attributes:
        num_changes: How often a stage began or ended so far; another thread may look.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        """Start at zero.

        Args:
            clock: The host's if None.
        """
        self._clock: Clock | None = clock or HostClock()
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._charged_until: Any = None
        self.num_changes = 0

    @property
    def current(self) -> str:
        """The innermost open stage, empty if none is; another thread may look."""
        return next(reversed(self._open), "")

    @classmethod
    def on(cls, device: torch.device) -> "StageTimer":
        """A timer for work on this device."""
        return cls(CudaClock(device) if device.type == "cuda" else HostClock())

    @classmethod
    def off(cls) -> "StageTimer":
        """A timer that records nothing, for when nobody will ask."""
        timer = cls()
        timer._clock = None
        return timer

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of the ``with`` block to a stage, also when the block raises.

        Args:
            name: One of :data:`STAGES`.

        Raises:
            ValueError: If the name is none of :data:`STAGES`.
        """
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}: must be one of {', '.join(STAGES)}")
        self._charge_innermost()
        self._open.append(name)
        self.num_changes += 1
        try:
            yield
        finally:
            self._charge_innermost()
            self._open.pop()
            self.num_changes += 1

    def snapshot(self) -> StageSeconds:
        """What was recorded up to now, and start again from zero.

        A stage that is still open is charged up to now and goes on counting.
        """
        self._charge_innermost()
        spans, self._spans = self._spans, []
        return StageSeconds(self._clock or HostClock(), spans)

    def lap(self) -> dict[str, float]:
        """:meth:`snapshot`, read at once."""
        return self.snapshot().read()

    def _charge_innermost(self) -> None:
        if self._clock is None:
            return
        now = self._clock.mark()
        if self._open:
            self._spans.append((self._open[-1], self._charged_until, now))
        self._charged_until = now

"""TensorBoard's event files of a run: a convenience, given up with one warning where they cannot be written."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class EventFiles:
    """Scalars for TensorBoard, or nothing where it is not installed or its files cannot be written.

    Args:
        directory: The run's folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("TensorBoard is not installed: no event files (metrics.jsonl is complete without them)")
            return
        _quiet_tensorboards_threads()
        self._try(lambda: self._open(SummaryWriter))

    def add_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Show numbers under their tags."""
        if self._writer is not None:
            self._try(lambda: [self._writer.add_scalar(tag, value, iteration) for tag, value in scalars.items()])

    def close(self) -> None:
        """Write what is waiting. May be called twice."""
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _open(self, summary_writer: Callable[[Path], Any]) -> None:
        self._writer = summary_writer(self._directory)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._writer = None  # not closed: that would write, and fail, again
            logger.warning(
                "TensorBoard's event files in %s cannot be written (%s) and are given up; metrics.jsonl goes on",
                self._directory, error.strerror,
            )  # fmt: skip


def _quiet_tensorboards_threads() -> None:
    """Print no traceback for a file that a thread of TensorBoard's cannot write: its next call raises the same."""
    inner = threading.excepthook
    if getattr(inner, "__module__", "") == __name__:
        return

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_tensorboards = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboards and isinstance(arguments.exc_value, OSError)):
            inner(arguments)

    threading.excepthook = hook

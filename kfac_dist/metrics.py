"""A run's directory, its metrics and its progress display: written by rank 0, silent elsewhere.

Units: ``top1`` and ``top5`` are percentages (0 to 100), times are seconds, ``epoch`` is fractional.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from kfac_dist.errors import InputError

METRICS_FILE = "metrics.jsonl"
KINDS = ("train", "eval", "fisher", "event", "summary")
PROGRESS_VARIABLE = "KFAC_DIST_PROGRESS"

_SCALAR_KINDS = ("train", "eval", "fisher")  # those that TensorBoard shows

logger = logging.getLogger(__name__)


def choose_run_directory(output_dir: str | Path, name: str) -> Path:
    """Return ``output_dir/name``, or the first of ``name-2``, ``name-3``, … that holds no run yet.

    A directory holds a run when it has a ``metrics.jsonl``. Nothing is created. Call it on one rank and
    broadcast the answer: another rank may look after the first one has created the directory.

    Raises:
        InputError: If one cannot look there.
    """
    candidate = Path(output_dir) / name
    number = 1
    try:
        while (candidate / METRICS_FILE).exists():
            number += 1
            candidate = Path(output_dir) / f"{name}-{number}"
    except OSError as error:  # no permission, or a name that the file system finds too long
        raise InputError(
            f"run.output_dir, run.name: cannot use {candidate} ({error.strerror}); choose another folder or name"
        ) from error
    return candidate


class RunWriter:
    """Writes one run's directory: config.yaml, environment.json, metrics.jsonl, TensorBoard events, DONE.

    Every rank makes one and calls the same methods; only the main rank touches the disk.

    Args:
        directory: From :func:`choose_run_directory`; created with its parents.
        is_main: Whether this rank writes.
        config: The resolved configuration as YAML text.
        environment: From :func:`kfac_dist.environment.describe_environment`.

    Raises:
        InputError: If the directory cannot be created or written, or already holds a run.
    """

    def __init__(self, directory: Path, is_main: bool, config: str, environment: Mapping[str, Any]) -> None:
        self.directory = directory
        self._stream: TextIO | None = None
        self._tensorboard: Any = None
        if not is_main:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._stream = (directory / METRICS_FILE).open("x", encoding="utf-8")
            (directory / "config.yaml").write_text(config, encoding="utf-8")
            record = json.dumps(_json_value(environment), indent=2, ensure_ascii=False, allow_nan=False)
            (directory / "environment.json").write_text(record + "\n", encoding="utf-8")
        except FileExistsError as error:
            raise InputError(
                f"run.output_dir, run.name: {error.filename} already exists and is never overwritten; "
                "choose another name"
            ) from error
        except OSError as error:
            raise InputError(
                f"run.output_dir: cannot write the run's directory {directory} ({error.strerror}); "
                "choose a writable folder"
            ) from error
        self._tensorboard = _open_tensorboard(directory)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one object to metrics.jsonl and show its numbers in TensorBoard.

        The line is flushed at once, so a crash loses at most the line being written. Not-a-number and
        infinite values, which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity":
        ``float()`` reads them back, and a diverged run keeps the difference.

        Args:
            kind: One of :data:`KINDS`.
            **fields: The record's fields: numbers (also 0-dimensional tensors), strings, and mappings or
                sequences of these. Kinds train, eval and fisher need ``iteration``.

        Raises:
            ValueError: If the kind is unknown.
            TypeError: If a value is of no kind that JSON has.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: must be one of {', '.join(KINDS)}")
        if self._stream is None:
            return
        record = _json_value({"kind": kind, **fields})
        self._stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()
        if self._tensorboard is not None and kind in _SCALAR_KINDS:
            for tag, value in _scalars(kind, fields).items():
                self._tensorboard.add_scalar(tag, value, record["iteration"])

    def finish(self) -> None:
        """Close the files and mark the run as finished: DONE holds the time (UTC), and comes last."""
        is_main = self._stream is not None
        self.close()
        if is_main:
            (self.directory / "DONE").write_text(_utc_now() + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files without marking the run as finished. May be called twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl; a last line that was cut off in the middle is left out.

    Raises:
        InputError: If the folder has no metrics.jsonl, or a line other than the last is not an object.
    """
    path = Path(directory) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{directory}: no readable {METRICS_FILE} there; give the folder of a run") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is cut off, or empty
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {line[:60]!r}; the file is damaged") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: must be an object, got {line[:60]!r}; the file is damaged")
        records.append(record)
    return records


class Progress:
    """Progress of a run on stderr: a bar in a terminal, else a line now and then.

    mpirun hands stderr on through a pipe, so a rank cannot see whether a terminal is at the other end. The
    environment variable KFAC_DIST_PROGRESS decides where it is set: ``bar``, ``lines`` or ``off``. Lines
    come every 5 % of the run, and after a minute without one.

    Args:
        total: Iterations of the run.
        is_main: Whether this rank shows anything.
        stream: Where to write; stderr unless given.

    Raises:
        InputError: If KFAC_DIST_PROGRESS has another value.
    """

    _LINES = 20
    _QUIET_SECONDS = 60.0

    def __init__(self, total: int, is_main: bool, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        style = os.environ.get(PROGRESS_VARIABLE) or ("bar" if self._stream.isatty() else "lines")
        if style not in ("bar", "lines", "off"):
            raise InputError(f"{PROGRESS_VARIABLE} must be bar, lines or off, got {style!r}")
        self._style = style if is_main else "off"
        self._is_main = is_main
        self._total = total
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if self._style == "bar":
            self._bar = tqdm(total=total, file=self._stream, unit="it", dynamic_ncols=True)

    def update(self, epoch: float, loss: float, top1: float, images_per_second: float) -> None:
        """Count one iteration and show its figures (``top1`` in percent)."""
        self._done += 1
        figures = f"epoch {epoch:.2f}  loss {loss:.4f}  top-1 {top1:.1f} %  {images_per_second:,.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif self._style == "lines" and self._line_is_due():
            elapsed = self._last_line - self._started
            remaining = elapsed / self._done * (self._total - self._done)
            self._print(
                f"{100 * self._done / self._total:3.0f} %  iteration {self._done}/{self._total}  {figures}  "
                f"elapsed {_clock_text(elapsed)}  remaining {_clock_text(remaining)}"
            )

    def say(self, text: str) -> None:
        """Write a line of its own, without breaking the bar; shown with any style, on the main rank."""
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
        due = crossed or now - self._last_line >= self._QUIET_SECONDS
        if due:
            self._last_line = now
        return due

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _json_value(value: Any) -> Any:
    """Turn a value into what JSON can hold; see :meth:`RunWriter.write`."""
    if isinstance(value, torch.Tensor | np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _scalars(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a record under TensorBoard tags: kind, then its texts (layer, matrix), then the field."""
    prefix = "/".join([kind, *(value for value in fields.values() if isinstance(value, str))])
    scalars: dict[str, float] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            scalars |= {f"{prefix}/{key}/{name}": float(number) for name, number in value.items()}
        elif key != "iteration" and not isinstance(value, str):
            scalars[f"{prefix}/{key}"] = float(value)
    return scalars


def _open_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed: no event files (metrics.jsonl is complete without them)")
        return None
    return SummaryWriter(directory)


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""A run's directory and its metrics: written by rank 0, silent elsewhere.

Units: ``top1`` and ``top5`` are percentages (0 to 100), times are seconds, ``epoch`` is fractional.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from kfac_dist.errors import InputError, RankFailed
from kfac_dist.runs.event_files import EventFiles
from kfac_dist.runs.folders import not_writable
from kfac_dist.runs.reader import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE

KINDS = ("train", "eval", "fisher", "event", "summary")

DONE_FILE = "DONE"
"""Marks a run's folder as that of a finished run."""

_SCALAR_KINDS = ("train", "eval", "fisher")  # those that TensorBoard shows


class RunWriter:
    """Writes one run's directory: config.yaml, environment.json, metrics.jsonl, TensorBoard events, DONE.

    Every rank makes one and calls the same methods; only the main rank touches the disk.

    Args:
        directory: From :func:`kfac_dist.runs.folders.claim_run_directory`; created with its parents if need be.
        is_main: Whether this rank writes.
        config: The resolved configuration as YAML text.
        environment: From :func:`kfac_dist.runs.environment.describe_environment`.
        metrics_bytes: To go on with the run that is there: how much of its metrics holds; the rest is cut off. None
            makes a new run.

    Raises:
        InputError: If the directory cannot be created or written, or already holds a run.
    """

    def __init__(
        self,
        directory: Path,
        is_main: bool,
        config: str,
        environment: Mapping[str, Any],
        metrics_bytes: int | None = None,
    ) -> None:
        self.directory = directory
        self._stream: TextIO | None = None
        self._event_files: EventFiles | None = None
        if not is_main:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            metrics = directory / METRICS_FILE
            if metrics_bytes is not None:
                self._stream = _cut_metrics(metrics, metrics_bytes)
                (directory / DONE_FILE).unlink(missing_ok=True)
            elif metrics.exists() and metrics.stat().st_size:  # an empty one was claimed for this run
                raise FileExistsError(errno.EEXIST, "holds a run", str(metrics))
            else:
                self._stream = metrics.open("a", encoding="utf-8")
            (directory / CONFIG_FILE).write_text(config, encoding="utf-8")
            record = json.dumps(_json_value(environment), indent=2, ensure_ascii=False, allow_nan=False)
            # Paths may be no text; what stands for such bytes is an escape of JSON's, too.
            (directory / ENVIRONMENT_FILE).write_text(record + "\n", encoding="utf-8", errors="backslashreplace")
        except FileExistsError as error:
            raise InputError(
                f"run.output_dir, run.name: {error.filename} already exists and is never overwritten; "
                "choose another name"
            ) from error
        except OSError as error:
            if metrics_bytes is None and self._stream is not None:  # no run was begun: the last one is the one before
                with suppress(OSError):  # the first error is the one to tell
                    self._stream.close()
                    metrics.unlink(missing_ok=True)
            raise not_writable(directory, error) from error
        self._event_files = EventFiles(directory)

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
            RankFailed: If metrics.jsonl cannot be written. Event files that cannot are given up with a warning.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: must be one of {', '.join(KINDS)}")
        if self._stream is None:
            return
        record = _json_value({"kind": kind, **fields})
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if self._event_files is not None and kind in _SCALAR_KINDS:
            self._event_files.add_scalars(_scalars(kind, fields), record["iteration"])
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            raise self._failed(METRICS_FILE, error) from error

    def sync(self) -> int:
        """Put metrics.jsonl on the disk, as the checkpoint that counts on it will be; its length, 0 on other ranks.

        Raises:
            RankFailed: If that fails, as where a network's file system tells only now that the disk is full.
        """
        if self._stream is None:
            return 0
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # not every file system can
                raise self._failed(METRICS_FILE, error) from error
        return self._stream.tell()

    def cut(self, metrics_bytes: int) -> None:
        """Drop the metrics after this length, because the run goes back to where they had it.

        Raises:
            RankFailed: If that fails.
        """
        if self._stream is not None:
            try:
                self._stream.seek(metrics_bytes)
                self._stream.truncate()
            except OSError as error:
                raise self._failed(METRICS_FILE, error) from error

    def finish(self) -> None:
        """Close the files and mark the run as finished: DONE holds the time (UTC), and comes last."""
        is_main = self._stream is not None
        self.sync()
        self.close()
        if is_main:
            try:
                (self.directory / DONE_FILE).write_text(_utc_now() + "\n", encoding="utf-8")
            except OSError as error:
                raise self._failed(DONE_FILE, error) from error

    def close(self) -> None:
        """Close the files without marking the run as finished. May be called twice."""
        if self._event_files is not None:
            self._event_files.close()
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with suppress(OSError):  # every line was flushed, or its failure told
                stream.close()

    def _failed(self, name: str, error: OSError) -> RankFailed:
        return RankFailed(
            f"cannot write {name} in {self.directory} ({error.strerror}): make room there and go on with --resume auto"
        )


def _cut_metrics(path: Path, size: int) -> TextIO:
    """Open the metrics of a run that goes on, without what was written after its checkpoint."""
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise InputError(
            f"{path}: must have at least {size} bytes, as when its checkpoint was made, got {found}: it was cut off. "
            "Go on from an older checkpoint of the run, with --resume PATH, or begin a new run with model.pretrained"
        )
    stream = path.open("r+", encoding="utf-8")
    stream.seek(size)
    stream.truncate()
    return stream


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


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

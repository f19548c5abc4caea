"""What a run's folder holds, and reading its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from kfac_dist.errors import InputError

METRICS_FILE = "metrics.jsonl"

CONFIG_FILE = "config.yaml"
"""The resolved configuration."""

ENVIRONMENT_FILE = "environment.json"
"""What the run was made with."""


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

"""How often a run was started again at the same iteration: a job that only crashes must not be queued for ever."""

import json
import logging
from pathlib import Path

from kfac_dist.communicator import Communicator
from kfac_dist.errors import NoProgress

RESTARTS_FILE = "restarts.json"
_MOST = 3
_LARGEST = 10_000  # bytes

logger = logging.getLogger(__name__)


def count_restart(run: Path, iteration: int, communicator: Communicator) -> int:
    """Which restart without progress this is; collective, rank 0 looks.

    Args:
        run: Folder of the run that goes on, or that left nothing to go on with.
        iteration: Where it goes on.
        communicator: Of all ranks.

    Returns:
        1 for the first restart at this iteration, and so on.

    Raises:
        NoProgress: On every rank, if it was restarted three times and always ended before the next checkpoint.
    """
    before, count = _read(run / RESTARTS_FILE) if communicator.is_main else (None, 0)
    count = count + 1 if before is not None and iteration <= before else 1
    count = int(communicator.gather_bytes(str(count).encode())[0])
    if count > _MOST:
        raise NoProgress(
            f"{run} was restarted {_MOST} times at iteration {iteration} and never came as far as its next checkpoint: "
            f"see its log.txt; delete {RESTARTS_FILE} there once the cause is removed"
        )
    return count


def note_start(run: Path, iteration: int, count: int, communicator: Communicator) -> None:
    """Leave in the run's folder, before training, how often it was begun here; rank 0 does."""
    if communicator.is_main:
        text = json.dumps({"iteration": iteration, "restarts": count})
        try:
            (run / RESTARTS_FILE).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s: cannot be written (%s), restarts are not counted", run / RESTARTS_FILE, error.strerror)


def _read(path: Path) -> tuple[int | None, int]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_LARGEST))
        return int(content["iteration"]), int(content["restarts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, 0  # never restarted, or cut off by a crash: it is counted anew

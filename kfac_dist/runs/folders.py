"""Which folder a run gets (NAME, NAME-2, NAME-3, …), and in which one it is found again."""

import json
import re
from contextlib import suppress
from pathlib import Path

import yaml

from kfac_dist.errors import InputError
from kfac_dist.runs.reader import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE


def choose_run_directory(output_dir: str | Path, name: str) -> Path:
    """Return ``output_dir/name``, or ``name-2``, ``name-3``, …: the first behind all that hold a run of this name.

    A directory holds a run when it has a ``metrics.jsonl``. Nothing is created; see :func:`claim_run_directory`.

    Raises:
        InputError: If one cannot look there.
    """
    number = max(_runs(output_dir, name), default=0) + 1
    while _holds_run(_numbered(output_dir, name, number)):
        number += 1
    return _numbered(output_dir, name, number)


def last_run_directory(output_dir: str | Path, name: str) -> Path | None:
    """The newest run of this name: the last of ``name``, ``name-2``, … that holds one; None if none does.

    Raises:
        InputError: If one cannot look there.
    """
    runs = _runs(output_dir, name)
    return runs[max(runs)] if runs else None


def run_of_job(output_dir: str | Path, name: str, job: str) -> Path | None:
    """The newest run of this name that this job of Slurm's has begun or gone on with; None if it has none.

    Raises:
        InputError: If one cannot look there.
    """
    for _, run in sorted(_runs(output_dir, name).items(), reverse=True):
        with suppress(OSError, ValueError, LookupError, TypeError):  # it was killed before it wrote this
            record = json.loads((run / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
            if record["variables"]["SLURM_JOB_ID"] == job:
                return run
    return None


def _runs(output_dir: str | Path, name: str) -> dict[int, Path]:
    """Runs of this name by number: without a gap, and behind one those whose configuration names them so."""
    found = {}
    number = 1
    while _holds_run(path := _numbered(output_dir, name, number)):
        found[number] = path
        number += 1
    with suppress(
        FileNotFoundError, NotADirectoryError, PermissionError
    ):  # a folder may be entered by those who may not list it
        for path in Path(output_dir).expanduser().iterdir():
            match = re.fullmatch(re.escape(name) + r"-([1-9]\d*)", path.name)
            if match and int(match[1]) > number and _name_of(path) == name and _holds_run(path):
                found[int(match[1])] = path
    return found


def _numbered(output_dir: str | Path, name: str, number: int) -> Path:
    return Path(output_dir).expanduser() / (name if number == 1 else f"{name}-{number}")


def _holds_run(path: Path) -> bool:
    try:
        return (path / METRICS_FILE).exists()
    except OSError as error:  # no permission, or a name that the file system finds too long
        raise InputError(
            f"run.output_dir, run.name: cannot use {path} ({error.strerror}); choose another folder or name"
        ) from error


def _name_of(run: Path) -> str | None:
    with suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return str(yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))["run"]["name"])
    return None


def claim_run_directory(output_dir: str | Path, name: str) -> Path:
    """Like :func:`choose_run_directory`, and take it with an empty ``metrics.jsonl``, which only one process can make.

    Call it on one rank and broadcast the answer.

    Raises:
        InputError: If one cannot look or write there.
    """
    while True:
        directory = choose_run_directory(output_dir, name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / METRICS_FILE).touch(exist_ok=False)
        except FileExistsError as error:
            if not directory.is_dir():
                raise not_writable(directory, error) from error
        except OSError as error:
            raise not_writable(directory, error) from error
        else:
            return directory


def not_writable(directory: Path, error: OSError) -> InputError:
    """What to raise where a run's folder cannot be made or written."""
    return InputError(
        f"run.output_dir: cannot write the run's directory {directory} ({error.strerror}); choose a writable folder"
    )

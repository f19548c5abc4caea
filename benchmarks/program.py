"""What the benchmark programs share: the command line, the device, and the record that they write."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import torch

from kfac_dist.communicator.devices import choose_device
from kfac_dist.errors import InputError
from kfac_dist.runs.environment import describe_environment
from kfac_dist.vocabulary import DeviceChoice

ROOT = Path(__file__).resolve().parent.parent


def create_parser(description: str) -> argparse.ArgumentParser:
    """A command line with what every program takes; the description is printed as it stands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=record_path, metavar="PATH", help="write PATH.json and PATH.md")
    return parser


def record_path(text: str) -> Path:
    """A path that a record can be written to, found out before anything is measured; its folder is made."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must lie in a folder that can be written to, got {text}: {error}") from None
    return path


def positive(text: str) -> float:
    """A number > 0 from the command line, such as 4, 0.25 or 1/9."""
    try:
        number = float(Fraction(text))
    except (ValueError, ArithmeticError):
        number = 0.0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be a number > 0, such as 4, 0.25 or 1/9; got {text!r}")
    return number


def count(text: str) -> int:
    """An integer >= 1 from the command line."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Let the command line choose a device, for `device_from`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")


def device_from(wanted: DeviceChoice, local_rank: int = 0) -> torch.device:
    """The device that the command line asks for; a GPU becomes torch's current one.

    Raises:
        InputError: If a GPU is asked for and torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device must be cpu or auto where torch sees no CUDA device, got cuda")
    return choose_device(wanted, local_rank)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a program of one process; errors that the user can fix end it with one line and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def describe_run(device: torch.device, mpi_library: str = "", hosts: Sequence[str] = ("host 0",)) -> dict[str, Any]:
    """What figures are measured on and with: call it before measuring, since it reads the load of the machine.

    Args:
        device: Where the work is done.
        mpi_library: The MPI library's version string, if the program communicates.
        hosts: Host of each rank, in rank order.
    """
    environment = describe_environment(mpi_library, hosts)
    del environment["working_directory"]  # of no use to a reader
    has_gpu = device.type == "cuda"
    return environment | {
        "command": _command(len(hosts)),
        "device": torch.cuda.get_device_name(device) if has_gpu else environment["cpu"]["model"],
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "load_average": os.getloadavg()[0],
    }


def write_record(
    output: Path | None, title: str, environment: dict[str, Any], results: object, tables: Sequence[str]
) -> None:
    """Write OUTPUT.json and OUTPUT.md, if there is an output.

    Args:
        output: Path without suffix.
        title: Of the Markdown file.
        environment: From `describe_run`.
        results: All figures, for json.
        tables: Lines of Markdown.
    """
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "environment": environment, "results": results}
    lines = [f"# {title}", "", _machine_line(environment), "", *tables]
    for suffix, text in (("json", json.dumps(record, indent=2)), ("md", "\n".join(lines))):
        unfinished = Path(f"{output}.{suffix}.tmp")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(f"{output}.{suffix}")  # at once: a program may be stopped while it writes


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text, and the others figures."""
    rule = "|---" + "|---:" * (len(heads) - 1) + "|"
    return ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _command(num_ranks: int) -> str:
    """The command line without where it wrote, and of absolute paths the last part."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    _, arguments = parser.parse_known_args()
    names = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    program = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    launcher = ["mpirun", "-n", str(num_ranks)] if num_ranks > 1 else []
    return shlex.join([*launcher, "python", program, *names])


def _machine_line(environment: dict[str, Any]) -> str:
    software = [f"torch {environment['packages']['torch']}", f"Python {environment['python']}"]
    if environment["cudnn"] is not None:
        software.insert(1, f"CUDA {environment['cuda']}, cuDNN {environment['cudnn']}")
    return (
        f"`{environment['command']}`, {environment['started'][:10]}: {environment['device']}, "
        f"{environment['cpu']['num_usable']} cores, ranks: {environment['num_ranks']}, threads per rank: "
        f"{environment['cpu']['torch_threads']}, load average before: {environment['load_average']:.1f}; "
        f"{', '.join(software)}."
    )

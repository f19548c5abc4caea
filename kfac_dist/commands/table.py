"""`kfac-dist COMMAND …`: finds the command and calls it. Nothing heavy is imported before the choice is made."""

import difflib
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from kfac_dist import __version__
from kfac_dist.commands.endings import EXIT_INTERRUPTED, interruptible
from kfac_dist.communicator.terminal import outliving_readers
from kfac_dist.doctor.findings import PATIENCE_SECONDS
from kfac_dist.doctor.software import launcher_rank

EXIT_USAGE = 2


class Command(NamedTuple):
    """A row of the table: the function, as ``module:name``, and one line for the screen.

    The function takes the words behind the command's name. It returns the exit code, or ends the process itself.
    """

    function: str
    summary: str


COMMANDS = {
    "train": Command("kfac_dist.commands.early:train", "train a recipe or a YAML file, or go on with a run"),
    "evaluate": Command("kfac_dist.commands.early:evaluate", "show the accuracy of a run or of a checkpoint"),
    "explain": Command(
        "kfac_dist.commands.early:explain", "show layers, owners, bytes and schedules of a configuration"
    ),
    "plan": Command("kfac_dist.commands.plan:plan", "predict seconds, memory and hours on 1 to 4096 GPUs"),
    "memory": Command("kfac_dist.memory:main", "show what the Fisher of a network takes on each rank"),
    "plots": Command("kfac_dist.plots.command:main", "draw curves and the paper's figures"),
    "report": Command("kfac_dist.report.command:main", "write a page about a run, several runs or a study"),
    "study": Command("kfac_dist.study.command:main", "compare optimizers over batch sizes and grids of settings"),
    "doctor": Command("kfac_dist.commands.doctor:main", "check this machine and this launch"),
}


def main(arguments: Sequence[str] | None = None, program: str = "kfac-dist") -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: The words behind `kfac-dist`; by default those of this process.
        program: How the user called it, for the screen.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    with outliving_readers():
        return _run(name, rest, program)


def _run(name: str, rest: Sequence[str], program: str) -> int:
    if name == "--version":
        return _say(f"kfac_dist {__version__}")
    if name in ("-h", "--help"):
        return _say(screen(program))
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"; did you mean {close[0]}?" if close else ""
        found = f"error: no command {name!r}{remedy}" if name else "error: a command is missing"
        if launcher_rank(os.environ) == 0:
            print(f"{found}\n\n{screen(program)}", file=sys.stderr)
        else:  # the first rank that ends with an error takes the others with it
            time.sleep(PATIENCE_SECONDS)
        return EXIT_USAGE
    module, _, function = COMMANDS[name].function.partition(":")
    with interruptible():
        command = import_module(module)
    code: int = 0
    try:
        code = getattr(command, function)(rest)
    except KeyboardInterrupt:  # of a command of one process; `launch.run` ends all ranks of the others
        print("interrupted (Ctrl-C)", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def screen(program: str) -> str:
    """What there is, in one screen."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: [mpirun -n P] {program} COMMAND …",
            "",
            *(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            f"  {program} COMMAND --help   what the command takes",
            f"  {program} --version        the version",
            "",
            f"First run: mpirun -n 2 {program} train quickstart",
        ]
    )


def _say(text: str) -> int:
    if launcher_rank(os.environ) == 0:
        print(text)
    return 0

"""`train.py` and `kfac-dist train`, `evaluate` and `explain` up to where they need torch, which takes seconds to load.

Started as one process, they answer at once where help is wanted, or the configuration is wrong or only to be shown.
Several ranks find out together, so that what only one of them cannot do (read a file that its host lacks) ends all.
A configuration that comes through a pipe can be read once, and so is left to what trains with it.
"""

import os
import stat
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kfac_dist.commands.endings import interruptible
from kfac_dist.communicator.launcher_variables import promised_size
from kfac_dist.communicator.terminal import outliving_readers
from kfac_dist.errors import InputError
from kfac_dist.training.command_line import Parse, parse_evaluate, parse_explain, parse_train

EXIT_BAD_INPUT = 2  # as in `kfac_dist.communicator.launch`, which loads torch


def run_script() -> None:
    """`train.py`; ends the process."""
    with outliving_readers():
        _run(sys.argv[1:], parse_train)


def train(arguments: Sequence[str]) -> None:
    """`kfac-dist train`; ends the process."""
    _run(arguments, partial(parse_train, program="kfac-dist train"))


def evaluate(arguments: Sequence[str]) -> None:
    """`kfac-dist evaluate`; ends the process."""
    _run(arguments, parse_evaluate)


def explain(arguments: Sequence[str]) -> None:
    """`kfac-dist explain`; ends the process."""
    _run(arguments, parse_explain)


def _run(arguments: Sequence[str], parse: Parse) -> None:
    promise = promised_size(os.environ)
    with interruptible():
        if promise is None or promise[1] == 1:
            code = answer(arguments, parse)
            if code is not None:
                sys.exit(code)
        from kfac_dist.commands.train import main
        from kfac_dist.communicator import launch

    launch.run(partial(main, arguments, parse))


def answer(arguments: Sequence[str], parse: Parse) -> int | None:
    """Answer a command line without torch, if that can be done; returns the exit code, or else None."""
    from kfac_dist.config.load import load_config  # another package's absence must end all ranks, see `launch`

    try:
        wanted = parse(arguments)
        if wanted.help:
            print(wanted.help_text)
            return 0
        if _is_pipe(wanted.config):
            return None
        config = load_config(wanted.config, wanted.overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if wanted.print_config:
        print(config.to_yaml())
        return 0
    return None


def _is_pipe(path: str | Path) -> bool:
    """Whether it is a pipe, as of a shell's `<(…)`, a terminal or the like, rather than a file or nothing at all."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # reading it says what is wrong
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

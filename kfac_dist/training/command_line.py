"""The command lines of `train.py` and of `kfac-dist train`, `evaluate`, `explain` and `plan`."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from kfac_dist.errors import InputError
from kfac_dist.runs.reader import CONFIG_FILE

Parse = Callable[[Sequence[str]], argparse.Namespace]
"""What reads a command line."""

_MOST_RANKS = 1 << 16  # a plan for so many takes 20 s and 1 GB, and both grow in proportion
_DEFAULTS = {"print_config": False, "explain": False, "ranks": None, "resume": None, "evaluate": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        close = difflib.get_close_matches(unknown.partition("=")[0], re.findall(r"--[a-z-]+", self.format_help()), n=1)
        if unknown != message and close:
            message += f"; did you mean {close[0]}?"
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def parse_train(arguments: Sequence[str], program: str = "train.py") -> argparse.Namespace:
    """What the user wants; all ranks have the same.

    Args:
        arguments: The words of the command line.
        program: How the user called it, for the usage.

    Raises:
        InputError: If that makes no sense.
    """
    start = program if program.startswith("kfac-dist") else f"python {program}"
    parser = _parser(
        f"{program} [options] CONFIG.yaml [dotted.key=value …]",
        f"Train an image classifier with distributed K-FAC: [mpirun -n P] {start} CONFIG.yaml [key=value …].",
    )
    _add_configuration_(parser)
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    parser.add_argument("--explain", action="store_true", help="show layers, owners, bytes and schedules, and stop")
    _add_ranks_(parser, "ranks that --explain assumes (default: those there are)")
    parser.add_argument(
        "--resume", metavar="auto|job|PATH", type=_given,
        help="go on with a run's folder or checkpoint; auto: with the last run of run.name, if it was not finished; "
        "job: with the one that this job of Slurm's began",
    )  # fmt: skip
    parser.add_argument(
        "--evaluate",
        metavar="PATH",
        type=_given,
        help="show the accuracy of a run's newest checkpoint, or of this one, and stop",
    )
    found = _parse(parser, arguments)
    if found.resume and found.evaluate:
        parser.error("argument --evaluate: not allowed with argument --resume")
    return found


def parse_explain(arguments: Sequence[str]) -> argparse.Namespace:
    """What `kfac-dist explain` is to show, as `parse_train` tells it.

    Raises:
        InputError: If that makes no sense.
    """
    parser = _parser(
        "kfac-dist explain [--ranks P] CONFIG.yaml [dotted.key=value …]",
        "Show layers, owners, bytes and schedules of a configuration, without data and training.",
    )
    _add_configuration_(parser)
    _add_ranks_(parser, "number of ranks to plan for (default: those there are)")
    found = _parse(parser, arguments)
    found.explain = True
    return found


def parse_plan(arguments: Sequence[str], program: str = "kfac-dist plan") -> argparse.Namespace:
    """What `kfac-dist plan` is to predict.

    Args:
        arguments: The words of the command line.
        program: How the user called it, for the usage.

    Raises:
        InputError: If that makes no sense.
    """
    parser = _parser(
        f"{program} [options] CONFIG.yaml [dotted.key=value …]",
        "Predict seconds an iteration, memory and hours on numbers of ranks, without data and training.",
    )
    _add_configuration_(parser)
    parser.add_argument(
        "--ranks", dest="numbers", metavar="P,P,…", default="",
        help="numbers, such as 1,2,4 or 1 2 4 (default: powers of two up to 4096 over which the batch divides)",
    )  # fmt: skip
    parser.add_argument("--profile", metavar="NAME|FILE", help="the machine: v100, a100, h100 (default), h200, or YAML")
    parser.add_argument(
        "--measure", type=Path, metavar="FILE.yaml",
        help="measure this machine under as many ranks as there are, write its profile, and plan with it",
    )  # fmt: skip
    parser.add_argument(
        "--grow-batch", action="store_true",
        help="one slot of batch.per_rank a rank, so that the batch grows with the ranks (the paper's Figure 2)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="write plan.txt, plan.json and plan.png there")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    found = _parse(parser, _with_commas(arguments))
    if not found.help:
        if found.profile and found.measure:
            parser.error("argument --measure: not allowed with argument --profile")
        found.numbers = _ranks_in(found.numbers, parser)
    return found


def _with_commas(arguments: Sequence[str]) -> list[str]:
    """The numbers behind --ranks as one word, which leaves what follows them to be read as ever."""
    words: list[str] = []
    for word in arguments:
        if words[-2:-1] == ["--ranks"] and re.fullmatch(r"[\d,]+", words[-1]) and re.fullmatch(r"[\d,]+", word):
            words[-1] = f"{words[-1].rstrip(',')},{word.lstrip(',')}"
        else:
            words.append(word)
    return words


def _ranks_in(text: str, parser: _Parser) -> list[int]:
    """Numbers between commas; none in an empty text."""
    numbers = []
    for word in text.split(",") if text else ():
        digits = word.strip()
        # Python converts 4,300 digits at most.
        if not (digits.isdecimal() and len(digits) < 20 and 1 <= int(digits) <= _MOST_RANKS):
            parser.error(
                f"argument --ranks: must be integers from 1 to {_MOST_RANKS} between commas or spaces, such as 1,2,4; "
                f"got {digits!r}"
            )
        numbers.append(int(digits))
    return numbers


def parse_evaluate(arguments: Sequence[str]) -> argparse.Namespace:
    """What `kfac-dist evaluate` is to show, as `parse_train` tells it; the configuration is the run's own.

    Raises:
        InputError: If that makes no sense, or there is no such run.
    """
    parser = _parser(
        "kfac-dist evaluate RUN [dotted.key=value …]",
        "Show top-1, top-5 and loss of a run's newest checkpoint, or of one checkpoint.",
    )
    parser.add_argument("config", nargs="?", metavar="RUN", help="a run's folder, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key, such as data.root")
    found = _parse(parser, arguments)
    if not found.help:
        found.evaluate = found.config
        found.config = _configuration_of(Path(found.evaluate))
    return found


def _given(value: str) -> str:
    """Refuse nothing at all, as of a shell's variable that is not set: it would mean a new run."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _configuration_of(place: Path) -> Path:
    """Of a run's folder, or of a checkpoint's, which is two folders further down."""
    for folder in (place, *place.resolve().parents[1:2]):
        if (folder / CONFIG_FILE).is_file():
            return folder / CONFIG_FILE
    raise InputError(f"RUN must be a run's folder, which holds {CONFIG_FILE}, or a checkpoint in one, got {place}")


def _parser(usage: str, description: str) -> _Parser:
    parser = _Parser(usage=usage, description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    return parser


def _add_configuration_(parser: _Parser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file, or a recipe's name, such as imagenet/bs4k")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the file")


def _add_ranks_(parser: _Parser, text: str) -> None:
    parser.add_argument("--ranks", type=int, metavar="P", help=text)


def _parse(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    # Options may stand before, between and behind overrides.
    found = parser.parse_intermixed_args(arguments, argparse.Namespace(**_DEFAULTS))
    if found.help:
        found.help_text = parser.format_help()
    elif found.config is None:
        parser.error("the following arguments are required: " + ("RUN" if "RUN" in str(parser.usage) else "config"))
    elif found.ranks is not None and found.ranks < 1:
        parser.error(f"argument --ranks: must be >= 1, got {found.ranks}")
    return found

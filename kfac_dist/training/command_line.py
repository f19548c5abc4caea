"""The command line of train.py."""

import argparse
from typing import NoReturn

from kfac_dist.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """What the user wants; all ranks have the same.

    Raises:
        InputError: If that makes no sense.
    """
    parser = _Parser(
        description=description, add_help=False, usage="train.py [options] CONFIG.yaml [dotted.key=value …]"
    )
    parser.add_argument("config", nargs="?", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the file")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    parser.add_argument("--explain", action="store_true", help="show layers, owners, bytes and schedules, and stop")
    parser.add_argument("--ranks", type=int, help="ranks that --explain assumes (default: those there are)")
    parser.add_argument(
        "--resume", metavar="auto|PATH",
        help="go on with a run's folder or checkpoint; auto: with the last run of run.name, if it was not finished",
    )  # fmt: skip
    parser.add_argument(
        "--evaluate", metavar="PATH", help="show the accuracy of a run's newest checkpoint, or of this one, and stop"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    arguments = parser.parse_intermixed_args()  # options may stand before, between and behind overrides
    if arguments.help:
        arguments.help_text = parser.format_help()
    elif arguments.config is None:
        parser.error("the following arguments are required: config")
    elif arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"argument --ranks: must be >= 1, got {arguments.ranks}")
    elif arguments.resume and arguments.evaluate:
        parser.error("argument --evaluate: not allowed with argument --resume")
    return arguments

"""The command for the Fisher's memory: `python -m kfac_dist.memory resnet50 --ranks 1 64`."""

import argparse
import sys
from collections.abc import Sequence

from kfac_dist.errors import InputError
from kfac_dist.planning.memory import report


def main(words: Sequence[str] | None = None) -> int:
    """Print the report that the command line asks for; returns the exit code.

    Args:
        words: Those of `kfac-dist memory`; by default this process's command line.
    """
    program = None if words is None else "kfac-dist memory"
    parser = argparse.ArgumentParser(program, description="Show what the Fisher of a network takes on each rank.")
    parser.add_argument("model", help="any name that model.name takes")
    parser.add_argument("--image-size", type=int, default=224, help="default: 224")
    parser.add_argument("--channels", type=int, default=3, help="default: 3")
    parser.add_argument("--classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--batch", type=int, default=32, help="images of a micro-batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64], help="numbers of ranks to share over")
    arguments = parser.parse_args(words)
    shape = (arguments.channels, arguments.image_size, arguments.image_size)
    try:
        _check_positive("--image-size", arguments.image_size)
        _check_positive("--channels", arguments.channels)
        _check_positive("--classes", arguments.classes)
        _check_positive("--batch", arguments.batch)
        _check_positive("--ranks", *arguments.ranks)
        print(report(arguments.model, shape, arguments.classes, arguments.batch, arguments.ranks))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_positive(option: str, *values: int) -> None:
    for value in values:
        if value < 1:
            raise InputError(f"{option} must be >= 1, got {value}")


if __name__ == "__main__":
    sys.exit(main())

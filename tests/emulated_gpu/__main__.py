"""Runs a command where torch finds GPUs; see the package."""

import argparse
import os

from tests.emulated_gpu import environment, why_not


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulated_gpu", description=__doc__)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARGUMENTS]")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is missing")
    if reason := why_not():
        raise SystemExit(f"error: no GPU can be emulated here: {reason}")
    os.execvpe(arguments.command[0], arguments.command, os.environ | environment(arguments.gpus))


main()

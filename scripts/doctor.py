"""Check a machine and a launch before training: `[mpirun -n P] python scripts/doctor.py [--data DIR] [--output DIR]`.

Looks at launcher, world size, MPI, NCCL, GPUs, threads and folders on every rank, and prints each finding with its
remedy. Exit code 0 without errors, else 2.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from kfac_dist.doctor.findings import Finding, Watchdog, exit_code, format_report, report_as_json
from kfac_dist.doctor.software import launcher_rank, software_findings
from kfac_dist.errors import AgreedInputError, InputError

_PATIENCE_SECONDS = 3.0  # the launcher ends all when the first process ends with an error: let rank 0 print before

watchdog = Watchdog(launcher_rank(os.environ))
watchdog.watch("loading torch and starting MPI", limit_seconds=180)
try:
    from kfac_dist.communicator import MpiCommunicator, launch
    from kfac_dist.doctor.examine import examine
except Exception as error:  # torch or MPI cannot be loaded: say what is missing, not where Python stumbled over it
    reason = f"{type(error).__name__}: {error}"
    remedy = "scripts/setup.sh; on a cluster load the MPI module that mpi4py was built with"
    findings = [*software_findings(), Finding("loading", "error", f"torch or MPI cannot be loaded: {reason}", remedy)]
    if launcher_rank(os.environ) == 0:
        print(format_report(findings), flush=True)
    else:
        print(f"error: rank {launcher_rank(os.environ)}: {findings[-1].found}", file=sys.stderr, flush=True)
        time.sleep(_PATIENCE_SECONDS)
    sys.exit(exit_code(findings))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    description, _, explanation = __doc__.partition("\n\n")
    parser = _Parser(description=description, epilog=explanation, add_help=False)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data set (data.root)")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs"), help="default: runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    arguments = parser.parse_args()
    arguments.help_text = parser.format_help()
    return arguments


def main() -> int:
    """Run one rank; returns the exit code, which is the same on every rank."""
    start = time.perf_counter()
    # Over MPI and the CPU, whatever GPUs there are: the checks must run where they do not go together.
    communicator = MpiCommunicator("reduce")
    # Where every process became a job of its own, the launcher's first still speaks for all.
    speaks = communicator.is_main and (communicator.size > 1 or launcher_rank(os.environ) == 0)
    try:
        with communicator.raise_on_all_ranks():
            arguments = parse_arguments()
        if arguments.help:
            communicator.print_once(arguments.help_text)
            return 0
        findings = examine(communicator, arguments.output, arguments.data, watchdog)
        seconds = time.perf_counter() - start
        if speaks:
            print(format_report(findings), flush=True)
        with communicator.raise_on_all_ranks():
            if speaks and arguments.json:
                write_json(arguments.json, report_as_json(findings, communicator.size, seconds))
        if communicator.is_main and not speaks:
            time.sleep(_PATIENCE_SECONDS)
        return exit_code(findings)
    except AgreedInputError as error:
        communicator.print_once(f"error: {error}", sys.stderr)
        return launch.EXIT_BAD_INPUT
    finally:
        watchdog.stop()


def write_json(path: Path, report: dict[str, object]) -> None:
    """Write the report for programs."""
    try:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path} cannot be written: {error.strerror}; choose another path") from error


if __name__ == "__main__":
    launch.run(main)

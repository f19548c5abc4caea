"""Check a machine and a launch before training: `[mpirun -n P] python scripts/doctor.py [--data DIR] [--output DIR]`.

Looks at launcher, world size, MPI, NCCL, GPUs, threads and folders on every rank, and prints each finding with its
remedy. Exit code 0 without errors, else 2.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kfac_dist.doctor import findings
from kfac_dist.doctor.software import launcher_rank, software_findings


def parse_arguments() -> argparse.Namespace:
    """Command line; all ranks have the same."""
    description, _, explanation = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=explanation)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data set (data.root)")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs"), help="default: runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    return parser.parse_args()


def main(arguments: argparse.Namespace, rank: int, guard: findings.HangGuard) -> int:
    """Run one rank, by the launcher's number; returns the exit code, the same on all but where --json fails."""
    # On the CPU and unchecked, whatever ranks and GPUs there are: the checks must run where they do not go together.
    communicator = connect_ranks()
    found = examine(communicator, arguments.output, arguments.data, guard)
    # Where every process became a job of its own, the launcher's first still speaks for all.
    if communicator.is_main and (communicator.size > 1 or rank == 0):
        print(findings.format_report(found), flush=True)
        if arguments.json:
            try:
                report = findings.report_as_json(found, communicator.size)
                arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                message = f"error: --json {arguments.json} cannot be written: {error.strerror}; choose another path"
                print(message, file=sys.stderr)
                return findings.EXIT_ERRORS
    elif communicator.is_main:
        time.sleep(findings.PATIENCE_SECONDS)
    return findings.exit_code(found)


if __name__ == "__main__":
    arguments, rank = parse_arguments(), launcher_rank(os.environ)
    guard = findings.HangGuard(rank)
    try:
        from kfac_dist.communicator import Communicator, launch
        from kfac_dist.communicator.launcher_variables import launched_by_torchrun
        from kfac_dist.doctor.examine import examine

        connect_ranks: Callable[[], Communicator]
        if launched_by_torchrun(os.environ):
            from kfac_dist.communicator.connect import connect_by_default_group

            connect_ranks = connect_by_default_group
        else:
            from kfac_dist.communicator import MpiCommunicator

            connect_ranks = partial(MpiCommunicator, "reduce")
    except Exception as error:  # say what is missing, not where Python stumbled over it
        found = f"torch or MPI cannot be loaded: {type(error).__name__}: {error}"
        remedy = "scripts/setup.sh; on a cluster load the MPI module that mpi4py was built with"
        findings.report_end(rank, [*software_findings(), findings.Finding("loading", "error", found, remedy, (rank,))])
        sys.exit(findings.EXIT_ERRORS)
    launch.run(lambda: main(arguments, rank, guard))

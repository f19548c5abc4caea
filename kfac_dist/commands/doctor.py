"""`kfac-dist doctor` and `scripts/doctor.py`: is this machine, and this launch, in order?

This file imports neither torch nor MPI before its function runs: what cannot be loaded is a finding.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kfac_dist.commands.endings import interruptible
from kfac_dist.doctor import findings
from kfac_dist.doctor.software import launcher_rank, software_findings

if TYPE_CHECKING:
    from kfac_dist.communicator import Communicator

_DESCRIPTION = "Check a machine and a launch before training: [mpirun -n P] {program} [--data DIR] [--output DIR]."
_EXPLANATION = (
    "Looks at launcher, world size, MPI, NCCL, GPUs, threads and folders on every rank, and prints each finding with "
    "its remedy. Exit code 0 without errors, else 2."
)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Check every rank, print what was found, and end the process.

    Args:
        words: Those of `kfac-dist doctor`; by default this process's command line.
    """
    options, rank = _parse(words), launcher_rank(os.environ)
    guard = findings.HangGuard(rank)
    try:
        with interruptible():
            from kfac_dist.communicator import launch
            from kfac_dist.doctor import examine  # noqa: F401  # loads now what it needs

            connect_ranks = _connection()
    except Exception as error:  # say what is missing, not where Python stumbled over it
        found = f"torch or MPI cannot be loaded: {type(error).__name__}: {error}"
        remedy = (
            "scripts/setup.sh; on a cluster load the MPI module that mpi4py was built with. One rank and torchrun need "
            "no MPI: torchrun --nproc-per-node=1 --no-python kfac-dist doctor looks at the rest"
        )
        findings.report_end(rank, [*software_findings(), findings.Finding("loading", "error", found, remedy, (rank,))])
        sys.exit(findings.EXIT_ERRORS)
    launch.run(partial(_check, options, rank, guard, connect_ranks))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    """All ranks have the same."""
    program = "python scripts/doctor.py" if words is None else "kfac-dist doctor"
    prog = None if words is None else program
    parser = argparse.ArgumentParser(
        prog, description=_DESCRIPTION.format(program=program), epilog=_EXPLANATION, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data set (data.root)")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs"), help="default: runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    return parser.parse_args(words)


def _connection() -> "Callable[[], Communicator]":
    from kfac_dist.communicator.launcher_variables import launched_by_torchrun

    if launched_by_torchrun(os.environ):
        from kfac_dist.communicator.connect import connect_by_default_group

        return connect_by_default_group
    from kfac_dist.communicator import MpiCommunicator

    # On the CPU and unchecked, whatever ranks and GPUs there are: the checks must run where they do not go together.
    return partial(MpiCommunicator, "reduce")


def _check(
    options: argparse.Namespace,
    rank: int,
    guard: findings.HangGuard,
    connect_ranks: "Callable[[], Communicator]",
) -> int:
    """Run one rank, by the launcher's number; returns the exit code, the same on all but where --json fails."""
    from kfac_dist.doctor.examine import examine

    communicator = connect_ranks()
    found = examine(communicator, options.output, options.data, guard)
    # Where every process became a job of its own, the launcher's first still speaks for all.
    if communicator.is_main and (communicator.size > 1 or rank == 0):
        print(findings.format_report(found), flush=True)
        if options.json:
            try:
                report = findings.report_as_json(found, communicator.size)
                options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                message = f"error: --json {options.json} cannot be written: {error.strerror}; choose another path"
                print(message, file=sys.stderr)
                return findings.EXIT_ERRORS
    elif communicator.is_main:
        time.sleep(findings.PATIENCE_SECONDS)
    return findings.exit_code(found)

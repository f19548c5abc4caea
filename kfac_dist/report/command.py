"""The command line of the reports.

python -m kfac_dist.report study FOLDER [--output FILE.html]
python -m kfac_dist.report card  RUN [--output FILE.html]
python -m kfac_dist.report pair  GROUP GROUP [GROUP ...] --output FILE.html

GROUP is [LABEL=]RUN, [LABEL=]'GLOB' or [LABEL=]STUDY:OPTIMIZER; the last one is the baseline.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kfac_dist.errors import InputError
from kfac_dist.report.card_page import report_run
from kfac_dist.report.groups import read_groups
from kfac_dist.report.pair_page import report_pair
from kfac_dist.report.study_page import report_study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    program = "python -m kfac_dist.report" if arguments is None else "kfac-dist report"
    options = _parser(program).parse_args(arguments)
    try:
        written = _report(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Write self-contained HTML pages, and the same as Markdown."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("study", help="figures, tables and the poster's findings of a study, finished or not")
    study.add_argument("folder", metavar="FOLDER", help="a study's folder (it holds manifest.jsonl and results/)")
    card = commands.add_parser("card", help="curves, stage times and curvature health of a run")
    card.add_argument("folder", metavar="RUN", help="a run's folder (it holds metrics.jsonl)")
    for command in (study, card):
        command.add_argument("--output", type=Path, metavar="FILE", help="page to write (FOLDER/report.html)")
    pair = commands.add_parser("pair", help="groups of runs by epoch, by iteration and by the clock")
    pair.add_argument(
        "groups", nargs="+", metavar="GROUP",
        help="[LABEL=]RUN, [LABEL=]'GLOB' of runs that differ by their seed, or [LABEL=]STUDY:OPTIMIZER for the best "
        "configuration of a study; the last is the baseline",
    )  # fmt: skip
    pair.add_argument("--model", metavar="NAME", help="of the study, where it has several")
    pair.add_argument("--batch-size", type=int, metavar="N", help="of the study, where it has several")
    pair.add_argument("--output", type=Path, required=True, metavar="FILE", help="page to write: FILE.html")
    return parser


def _report(options: argparse.Namespace) -> list[Path]:
    if options.command == "study":
        return report_study(options.folder, options.output)
    if options.command == "card":
        return report_run(options.folder, options.output)
    if len(options.groups) < 2:
        raise InputError(f"GROUP must be given at least twice, got {options.groups[0]} alone")
    return report_pair(read_groups(options.groups, options.model, options.batch_size), options.output)

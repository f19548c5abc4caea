"""The command line of studies.

python -m kfac_dist.study plan   STUDY.yaml [dotted.key=value ...] --folder DIR
python -m kfac_dist.study run    [STUDY.yaml [dotted.key=value ...]] --folder DIR [--workers N] [--only FILTER]
python -m kfac_dist.study status [STUDY.yaml] --folder DIR [--only FILTER]
python -m kfac_dist.study retry  [STUDY.yaml] --folder DIR [--only FILTER]
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kfac_dist.errors import InputError
from kfac_dist.study.definition import load_study
from kfac_dist.study.launch import run_workers, threads_for
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.status import describe_status, retry, select
from kfac_dist.study.trial_run import check_data
from kfac_dist.study.trials import Trial, plan_trials
from kfac_dist.study.worker import WorkerSettings

_LEASE_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 if a worker failed; 2 for bad input; 3 if trials failed; 75 if a signal stopped it.
    """
    parser = _parser("python -m kfac_dist.study" if arguments is None else "kfac-dist study")
    options, more = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in more):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.overrides += more  # those behind an option, which argparse leaves
    try:
        return _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description="Compare optimizers over batch sizes and grids of settings.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "write the manifest: every trial, its configuration in full"),
        ("run", "train the trials that are not finished; plans the study where that was not done"),
        ("status", "say how far the study is, and what failed"),
        ("retry", "let failed trials be run again by the next run"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("study", nargs="?", help="YAML file, see configs/study/; may be left out once planned")
        command.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the file")
        command.add_argument("--folder", required=True, type=Path, help="where the study lies")
        command.add_argument("--only", metavar="FILTER", help="such as optimizer=kfac,batch_size=512|1024,index=0-63")
        command.add_argument(
            "--lease", type=float, default=_LEASE_SECONDS, metavar="SECONDS",
            help=f"silence after which a worker of another machine is dead ({_LEASE_SECONDS:.0f})",
        )  # fmt: skip
    run = commands.choices["run"]
    run.add_argument("--workers", type=int, default=1, metavar="N", help="processes, which share the cores (1)")
    run.add_argument(
        "--no-wait", action="store_true", help="end when all that is left is in other workers' hands (Slurm arrays)"
    )
    run.add_argument("--keep-runs", action="store_true", help="keep each run's folder: its metrics and last checkpoint")
    return parser


def _run(options: argparse.Namespace) -> int:
    folder = StudyFolder(options.folder)
    if options.lease <= 0:
        raise InputError(f"--lease must be > 0, got {options.lease:g}")
    trials = select(_trials(options, folder), options.only)
    if options.command == "plan":
        print(f"{folder.path}: {len(trials)} trials{_by_cell(trials)}")
        return 0
    if options.command == "status":
        print("\n".join(describe_status(folder, trials, options.lease)))
        return 0
    if options.command == "retry":
        again = retry(folder, trials)
        print(f"{len(again)} failed trials will be run again{': ' if again else ''}{', '.join(map(str, again))}")
        return 0
    if options.workers < 1:
        raise InputError(f"--workers must be >= 1, got {options.workers}")
    finished = folder.finished()
    check_data(trial for trial in trials if trial.index not in finished)
    settings = WorkerSettings(
        folder=folder.path.resolve(),
        parent=os.getpid(),
        selected=[trial.index for trial in trials],
        threads=threads_for(options.workers),
        lease_seconds=options.lease,
        waits=not options.no_wait,
        keeps_runs=options.keep_runs,
    )
    code = run_workers(settings, options.workers)
    lines = describe_status(folder, trials, options.lease)
    print("\n".join(lines))
    return code or (3 if any(" failed: " in line for line in lines) else 0)


def _trials(options: argparse.Namespace, folder: StudyFolder) -> list[Trial]:
    """The study's, planned now or before."""
    if options.study is None:
        if options.command == "plan":
            raise InputError("plan needs the study's YAML file")
        return folder.read_plan()[1]
    study = load_study(Path(options.study), options.overrides)
    if options.command in ("status", "retry"):
        folder.read_plan()  # these write nothing where nothing is planned
    if options.command == "run" and not folder.is_planned:
        check_data(plan_trials(study))  # or the folder would keep a study that cannot be run
    return folder.write_plan(study)


def _by_cell(trials: Sequence[Trial]) -> str:
    counts = Counter((trial.model, trial.optimizer, trial.batch_size) for trial in trials)
    return "".join(f"\n  {model}, {optimizer}, batch {size}: {n}" for (model, optimizer, size), n in counts.items())

"""Whether the run that train.py was started for is finished: mpirun may end with 0 after it lost a host.

    python scripts/slurm/finished.py CONFIG.yaml [options and overrides, as for train.py]

Exit code 0 if the run's folder has a DONE file, or if train.py was not asked to train; else 75, to be queued again.
"""

import os
import sys
from pathlib import Path

from kfac_dist.communicator.launch import EXIT_STOPPED
from kfac_dist.config.load import load_config
from kfac_dist.runs.folders import last_run_directory, run_of_job
from kfac_dist.runs.reader import METRICS_FILE
from kfac_dist.runs.writer import DONE_FILE
from kfac_dist.training.command_line import parse_train


def main() -> int:
    """Look for the marker; returns the exit code."""
    arguments = parse_train(sys.argv[1:])
    if arguments.help or arguments.print_config or arguments.explain or arguments.evaluate:
        return 0
    config = load_config(arguments.config, arguments.overrides).run
    if arguments.resume in (None, "auto", "job"):  # of jobs with one name, each has a run of its own
        folder = run_of_job(config.output_dir, config.name, os.environ.get("SLURM_JOB_ID", ""))
        folder = folder or last_run_directory(config.output_dir, config.name)
    else:
        place = Path(arguments.resume).expanduser().resolve()
        folder = place if (place / METRICS_FILE).exists() else place.parent.parent  # of a checkpoint
    if folder is not None and (folder / DONE_FILE).exists():
        return 0
    print(f"the ranks ended with exit code 0, but {folder or config.name} has no {DONE_FILE}: a host was lost?")
    return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())

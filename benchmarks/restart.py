"""Seconds from the death of a rank to training again: until the job has ended, and until it trains after a resume.

    python benchmarks/restart.py CONFIG.yaml [key=value …] --ranks 2 --output benchmarks/results/DATE-restart

Trains the configuration under mpirun with a checkpoint every tenth of an epoch, sends SIGKILL to the last rank once
there is one, waits for the job's end, starts it anew with `--resume auto`, and sees when an iteration is reported.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from program import ROOT, count, create_parser, describe_run, run, table, write_record

from kfac_dist.errors import InputError

TITLE = "From a rank's death to training again"
PATIENCE = 300.0  # seconds


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--trials", type=count, default=3)
    return parser.parse_intermixed_args()


def start(arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    """The job; goes on with what it finds in the folder."""
    command = [f"{ROOT}/scripts/mpirun.sh", "-n", str(arguments.ranks), sys.executable, f"{ROOT}/train.py"]
    overrides = [*arguments.overrides, f"run.output_dir={folder}", "run.name=run", "checkpoint.every_epochs=0.1"]
    return subprocess.Popen(
        [*command, arguments.config, *overrides, "--resume", "auto"],
        env=os.environ | {"KFAC_DIST_PROGRESS": "off"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until(happened: partial[bool], job: subprocess.Popen[bytes]) -> None:
    """Wait for something that the job does.

    Raises:
        InputError: If the job ends before, or it takes too long.
    """
    deadline = time.perf_counter() + PATIENCE
    while not happened():
        if job.poll() is not None or time.perf_counter() > deadline:
            raise InputError(f"the configuration must train for long enough; its job ended with {job.poll()}")
        time.sleep(0.002)


def ranks_of(job: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the ranks, which mpirun is the parent of."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, children.stdout.split()))


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a whole one."""
    return any((folder / "run" / "checkpoints").glob("iteration-*"))


def trains_again(metrics: Path) -> bool:
    """Whether an iteration was reported after the resume, of which the metrics tell first."""
    return b'"resumed"' in (text := metrics.read_bytes()) and b'"train"' in text[text.rindex(b'"resumed"') :]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill and resume; seconds of each trial."""
    ended, trained = [], []
    for _ in range(arguments.trials):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = start(arguments, folder)
            try:
                wait_until(partial(has_checkpoint, folder), job)
                killed_at = time.perf_counter()
                os.kill(ranks_of(job)[-1], signal.SIGKILL)
                job.wait(PATIENCE)
                ended.append(time.perf_counter() - killed_at)
                job = start(arguments, folder)
                wait_until(partial(trains_again, folder / "run" / "metrics.jsonl"), job)
                trained.append(time.perf_counter() - killed_at)
            finally:
                job.terminate()
                job.wait()
    return {"ranks": arguments.ranks, "seconds_until_ended": ended, "seconds_until_training": trained}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    environment = describe_run(torch.device("cpu"))
    results = measure(arguments)
    medians = [f"{statistics.median(results[key]):.2f}" for key in ("seconds_until_ended", "seconds_until_training")]
    lines = table(["ranks", "job ended s", "training again s"], [[str(results["ranks"]), *medians]])
    write_record(arguments.output, TITLE, environment, results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(partial(main, parse_arguments()))

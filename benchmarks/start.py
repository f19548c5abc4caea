"""Seconds from mpirun to the first iteration and to the tenth, beside a start of torch and MPI alone.

    python benchmarks/start.py configs/quickstart.yaml --ranks 1 2 --output benchmarks/results/DATE-start

The configuration trains for at least 20 iterations. `--beside DIR` starts another checkout's train.py in turn with this
one's. Of one rank besides: seconds of importing, by `-X importtime`, which itself slows imports down; and the system
calls that name a file, where strace is installed.
"""

import argparse
import json
import os
import re
import shutil
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

from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError

TITLE = "From mpirun to the first iterations"
PATIENCE = 300.0  # seconds
POLL = 0.005  # seconds
FEWEST_ITERATIONS = 20
ALONE = "torch and MPI alone"
START_ALONE = "import sys, torch, mpi4py.MPI; open(sys.argv[1], 'w').close()"
EXPECTED = ("torch", "mpi4py")  # all that these import counts as theirs


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = create_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=count, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=count, default=5, help="that the medians are of; default: 5")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout of this program")
    return parser.parse_intermixed_args()


def command_of(arguments: argparse.Namespace, checkout: Path, folder: Path) -> list[str]:
    """The program of a checkout, with its run in the folder."""
    overrides = [*arguments.overrides, f"run.output_dir={folder}", "run.name=run"]
    return [f"{checkout}/train.py", str(Path(arguments.config).resolve()), *overrides]


def environment_of(checkout: Path) -> dict[str, str]:
    """For a program of that checkout."""
    return os.environ | {"PYTHONPATH": str(checkout), "KFAC_DIST_PROGRESS": "off"}


def launch(num_ranks: int, program: list[str], checkout: Path) -> subprocess.Popen[bytes]:
    """Start a program under mpirun."""
    return subprocess.Popen(
        [f"{ROOT}/scripts/mpirun.sh", "-n", str(num_ranks), sys.executable, *program],
        env=environment_of(checkout),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def iterations_in(metrics: Path) -> int:
    """How many were reported so far."""
    return metrics.read_bytes().count(b'{"kind": "train"') if metrics.is_file() else 0


def time_run(arguments: argparse.Namespace, checkout: Path, num_ranks: int) -> dict[str, float]:
    """Seconds until the first and the tenth iteration, and of an iteration after those.

    Raises:
        InputError: If the job fails, or ends too early.
    """
    with tempfile.TemporaryDirectory() as name:
        metrics = Path(name) / "run/metrics.jsonl"
        start = time.perf_counter()
        job = launch(num_ranks, command_of(arguments, checkout, Path(name)), checkout)
        seen: dict[int, float] = {}
        try:
            while job.poll() is None and time.perf_counter() - start < PATIENCE:
                for number in (1, 10):
                    if number not in seen and iterations_in(metrics) >= number:
                        seen[number] = time.perf_counter() - start
                time.sleep(POLL)
        finally:
            job.terminate()
            code = job.wait()
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        iterations = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        if code or len(iterations) < FEWEST_ITERATIONS:
            raise InputError(
                f"CONFIG must train for at least {FEWEST_ITERATIONS} iterations; its job ended with {code} after "
                f"{len(iterations)}"
            )
        batch = load_config(metrics.with_name("config.yaml")).batch.global_size
    rate = statistics.median(record["images_per_second"] for record in iterations[10:])
    return {"first": seen[1], "tenth": seen[10], "iteration": batch / rate}


def time_alone(num_ranks: int) -> float:
    """Seconds until a rank that only imports torch and starts MPI has done so."""
    with tempfile.TemporaryDirectory() as name:
        marker = Path(name, "started")
        start = time.perf_counter()
        job = launch(num_ranks, ["-c", START_ALONE, str(marker)], ROOT)
        while not marker.exists() and job.poll() is None:
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        job.wait()
    return seconds


def time_imports(arguments: argparse.Namespace, checkout: Path) -> dict[str, float]:
    """Seconds of importing in a run of one rank: `EXPECTED` with all that they import, and by package what else."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-X", "importtime", *command_of(arguments, checkout, Path(name))]
        finished = subprocess.run(command, env=environment_of(checkout), capture_output=True, text=True, check=True)
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \|( +)(\S+)$", finished.stderr, re.MULTILINE)
    seconds: dict[str, float] = {}
    parents: list[str] = []  # of the row; a module stands behind those that it imports
    for own, indent, module in reversed(rows):
        depth = len(indent) // 2
        parents[depth:] = [module.partition(".")[0]]
        package = next((parent for parent in parents if parent in EXPECTED), parents[-1])
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def count_calls(arguments: argparse.Namespace, checkout: Path) -> dict[str, int] | None:
    """System calls on names of files in a run of one rank; None without strace."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as name:
        trace = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", f"{name}/calls"]
        command = [*trace, sys.executable, *command_of(arguments, checkout, Path(name))]
        subprocess.run(command, env=environment_of(checkout), capture_output=True, check=True)
        calls = [
            line.partition(" ")[2].strip() for line in Path(name, "calls").read_text("utf-8", "replace").splitlines()
        ]
    opened = [call for call in calls if call.startswith("open") and "ENOENT" not in call]
    missing = [call for call in calls if "ENOENT" in call]
    python = [call for call in opened if ".pyc" in call]
    return {
        "all": len(calls),
        "opened": len(opened),
        "Python modules": len(python),
        "not found": len(missing),
    }


def revision_of(checkout: Path | None) -> str | None:
    """Git's short name of what a checkout holds."""
    if checkout is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or checkout.name


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, the checkouts and the start alone in turn."""
    checkouts = {"this checkout": ROOT} | ({"beside": arguments.beside.resolve()} if arguments.beside else {})
    seconds: dict[str, dict[str, list[Any]]] = {}
    for num_ranks in arguments.ranks:
        of_ranks = seconds[str(num_ranks)] = {name: [] for name in (ALONE, *checkouts)}
        for _ in range(arguments.trials):
            of_ranks[ALONE].append(time_alone(num_ranks))
            for name, checkout in checkouts.items():
                of_ranks[name].append(time_run(arguments, checkout, num_ranks))
    imports = {
        name: [time_imports(arguments, checkout) for _ in range(arguments.trials)]
        for name, checkout in checkouts.items()
    }
    calls = {name: count_calls(arguments, checkout) for name, checkout in checkouts.items()}
    return {"seconds": seconds, "import_seconds": imports, "file_calls": calls, "beside": revision_of(arguments.beside)}


def tables_of(results: dict[str, Any]) -> list[str]:
    """Medians."""
    rows = []
    for num_ranks, of_ranks in results["seconds"].items():
        alone = statistics.median(of_ranks[ALONE])
        rows.append([ALONE, num_ranks, f"{alone:.2f}", "", "", ""])
        for name, trials in of_ranks.items():
            if name != ALONE:
                first, tenth, steady = (statistics.median(trial[key] for trial in trials) for key in trials[0])
                beyond = f"{first - alone:.2f}"
                rows.append([name, num_ranks, f"{first:.2f}", beyond, f"{tenth:.2f}", f"{1000 * steady:.1f}"])
    heads = ["seconds until", "ranks", "first iteration", "beyond torch and MPI", "tenth", "later ones, ms each"]
    lines = table(heads, rows)
    if results["beside"]:
        lines += ["", f"Beside: the checkout at {results['beside']}."]
    lines += ["", "Seconds of importing, one rank, the fastest trial, since other work on the machine only adds:", ""]
    rows = []
    for name, trials in results["import_seconds"].items():
        packages = min(trials, key=lambda trial: sum(trial.values()))
        others = {package: value for package, value in packages.items() if package not in EXPECTED}
        largest = ", ".join(f"{package} {value:.2f}" for package, value in list(others.items())[:5])
        expected = sum(packages.values()) - sum(others.values())
        rows.append([name, f"{expected:.2f}", f"{sum(others.values()):.2f}", largest])
    lines += table(["", "torch, mpi4py and what they import", "all else", "of which the largest"], rows)
    calls = {name: found for name, found in results["file_calls"].items() if found}
    if calls:
        lines += ["", "System calls on names of files, one rank:", ""]
        heads = list(next(iter(calls.values())))
        lines += table(["", *heads], [[name, *(f"{found[head]:,}" for head in heads)] for name, found in calls.items()])
    return lines


def main(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    load_config(
        str(Path(arguments.config).resolve()), arguments.overrides
    )  # a mistake is named before jobs are started
    if arguments.beside is not None and not (arguments.beside / "train.py").is_file():
        raise InputError(f"--beside must be a checkout, which holds train.py, got {arguments.beside}")
    environment = describe_run(torch.device("cpu"))
    results = measure(arguments)
    lines = tables_of(results)
    write_record(arguments.output, TITLE, environment, results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    run(partial(main, parse_arguments()))

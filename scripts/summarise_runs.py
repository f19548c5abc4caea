"""Turn runs into a dated record: `python scripts/summarise_runs.py --title T --output benchmarks/X RUN [RUN …]`.

Writes X.json (accuracy by epoch, seconds, stages, fisher work, environment of each run) and X.md, a table of them.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kfac_dist.runs.reader import read_metrics


def summarise(run: Path) -> dict[str, Any]:
    """What a run's files say of it; times in seconds, accuracies in percent."""
    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    iteration_seconds = [sum(record["stage_seconds"].values()) for record in train]
    largest = max(record["communication_bytes"] for record in train)
    refreshes = [record for record in train if record["stage_seconds"]["inverse"] > 1e-4]
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] = "python " + environment["command"].partition(" ")[2]  # whichever interpreter it was
    return {
        "name": run.name,
        "command": environment["command"],
        "ranks": environment["num_ranks"],
        "top1_by_epoch": {round(record["epoch"], 2): round(record["top1"], 2) for record in evaluations},
        "final_top1": evaluations[-1]["top1"],
        "best_top1": max(record["top1"] for record in evaluations),
        "final_loss": statistics.mean(record["loss"] for record in train[-10:]),
        "iterations": len(train),
        "seconds": records[-1]["seconds"],
        "seconds_per_epoch": sum(iteration_seconds) / train[-1]["epoch"],
        "median_iteration_seconds": statistics.median(iteration_seconds),
        "stage_seconds_per_iteration": {
            stage: sum(record["stage_seconds"][stage] for record in train) / len(train)
            for stage in train[0]["stage_seconds"]
        },
        "share_of_iterations_with_inversion": len(refreshes) / len(train),
        "communication_share": sum(record["communication_bytes"] for record in train) / largest / len(train),
        "environment": environment,
    }


def markdown(title: str, note: str, runs: list[dict[str, Any]]) -> str:
    """The runs as tables."""
    environment = runs[0]["environment"]
    packages = environment["packages"]
    stages = list(runs[0]["stage_seconds_per_iteration"])
    lines = [
        f"# {title}",
        "",
        f"{environment['started'][:10]}, {environment['cpu']['model']}, {environment['cpu']['num_usable']} cores, "
        f"GPUs: {', '.join(environment['gpus']) or 'none'}; torch {packages['torch']}, {environment['mpi_library']}, "
        f"Python {environment['python']}. Seconds an epoch count training only.",
        *(["", note] if note else []),
        "",
        "| run | ranks | final top-1 % | best | training loss, last 10 | s an epoch | s an iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append(
            f"| {run['name']} | {run['ranks']} | {run['final_top1']:.2f} | {run['best_top1']:.2f} | "
            f"{run['final_loss']:.3f} | {run['seconds_per_epoch']:.1f} | {run['median_iteration_seconds']:.3f} |"
        )
    lines += ["", "Test top-1 in percent by epoch:", ""]
    lines += [
        f"- {run['name']}: " + ", ".join(f"{epoch} → {top1}" for epoch, top1 in run["top1_by_epoch"].items())
        for run in runs
    ]
    lines += ["", "Mean seconds an iteration by stage:", "", "| run | " + " | ".join(stages) + " |"]
    lines.append("|---" * (1 + len(stages)) + "|")
    for run in runs:
        cells = " | ".join(f"{run['stage_seconds_per_iteration'][stage]:.4f}" for stage in stages)
        lines.append(f"| {run['name']} | {cells} |")
    lines += ["", "Commands:", "", *(f"- {run['name']}: `{run['command']}`" for run in runs)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Summarise the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", default="", help="what a reader must know of the measurement")
    parser.add_argument("--output", required=True, type=Path, help="path without suffix")
    arguments = parser.parse_args()
    runs = [summarise(run) for run in arguments.runs]
    for run in runs:
        run["environment"].pop("working_directory", None)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{arguments.output}.json").write_text(json.dumps(runs, indent=2) + "\n")
    Path(f"{arguments.output}.md").write_text(markdown(arguments.title, arguments.note, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())

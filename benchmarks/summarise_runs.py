"""Turn runs into a dated record: accuracy by epoch, seconds, stages, and the environment of each run.

    python benchmarks/summarise_runs.py --title TITLE --output benchmarks/results/DATE-NAME RUN [RUN …]

Writes PATH.json and PATH.md, a table of the same.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from program import create_parser, run, table

from kfac_dist.errors import InputError
from kfac_dist.runs.reader import read_metrics


def summarise(folder: Path) -> dict[str, Any]:
    """What a run's files say of it; times in seconds, accuracies in percent.

    Raises:
        InputError: If the folder holds no finished run that trained and was evaluated.
    """
    records = read_metrics(folder)
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not train or not evaluations or records[-1]["kind"] != "summary":
        raise InputError(f"RUN must be the folder of a finished run that was evaluated, got {folder}")
    iteration_seconds = [sum(record["stage_seconds"].values()) for record in train]
    largest = max(record["communication_bytes"] for record in train)
    refreshes = [record for record in train if record["stage_seconds"]["inverse"] > 1e-4]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    environment["command"] = "python " + environment["command"].partition(" ")[2]  # whichever interpreter it was
    return {
        "name": folder.name,
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
        f"Python {environment['python']}. Seconds per epoch count training only.",
        *(["", note] if note else []),
        "",
        *table(
            ["run", "ranks", "final top-1 %", "best", "training loss, last 10", "s per epoch", "s per iteration"],
            [_figures(run) for run in runs],
        ),
    ]
    lines += ["", "Test top-1 in percent by epoch:", ""]
    lines += [
        f"- {run['name']}: " + ", ".join(f"{epoch} → {top1}" for epoch, top1 in run["top1_by_epoch"].items())
        for run in runs
    ]
    by_stage = [
        [run["name"], *(f"{run['stage_seconds_per_iteration'][stage]:.4f}" for stage in stages)] for run in runs
    ]
    lines += ["", "Mean seconds per iteration by stage:", "", *table(["run", *stages], by_stage)]
    lines += ["", "Commands:", "", *(f"- {run['name']}: `{run['command']}`" for run in runs)]
    return "\n".join(lines) + "\n"


def _figures(run: dict[str, Any]) -> list[str]:
    percent = [f"{run[name]:.2f}" for name in ("final_top1", "best_top1")]
    seconds = [f"{run['seconds_per_epoch']:.1f}", f"{run['median_iteration_seconds']:.3f}"]
    return [run["name"], str(run["ranks"]), *percent, f"{run['final_loss']:.3f}", *seconds]


def main() -> None:
    """Summarise the runs that the command line names."""
    parser = create_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", default="", help="what a reader must know of the measurement")
    arguments = parser.parse_args()
    runs = [summarise(folder) for folder in arguments.runs]
    for of_run in runs:
        of_run["environment"].pop("working_directory", None)
    text = markdown(arguments.title, arguments.note, runs)
    print(text, end="")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{arguments.output}.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)

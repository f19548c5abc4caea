"""`kfac-dist plan` against real iterations: what it predicts from rates measured here, and what training then takes.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --output benchmarks/results/DATE-plan
    python benchmarks/plan.py --model alexnet32 --intervals 1 --ranks 1 2

In each round, for each number of ranks in turn, the rates are measured (`--measure`) on as many ranks at once, but no
more than --cores; the iteration is predicted; and it is trained by train.py, without evaluation, on images that are
made up. More ranks than cores share them. Figures are medians over the rounds. Every process has one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from program import ROOT, count, create_parser, describe_run, run, table, write_record

from kfac_dist.config import strict_yaml
from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from kfac_dist.planning.profile import load_profile
from kfac_dist.planning.simulate import PLAN_STAGES, Simulation
from kfac_dist.plots.scaling import read_scaling_point

TITLE = "A plan beside training"


@dataclass(frozen=True)
class Point:
    """A number of ranks: seconds an iteration, medians over the rounds, and seconds of the stages in the last one."""

    predicted: float
    measured: float
    ratio: float
    ratios: list[float]
    predicted_stages: dict[str, float]
    measured_stages: dict[str, float]


def configuration(arguments: argparse.Namespace, interval: int, iterations: int) -> dict[str, object]:
    """A recipe for so many iterations; `interval` 0 is SGD."""
    size = arguments.image_size
    batch = arguments.batch * arguments.slots
    images = {"shape": [3, size, size], "num_classes": 10, "num_train": batch * iterations, "num_eval": 8}
    recipe: dict[str, object] = {
        "run": {"name": "plan"},
        "data": {"name": "synthetic", "synthetic": images},
        "model": {"name": arguments.model},
        "batch": {"global_size": batch, "per_rank": arguments.batch},
        "train": {"epochs": 1, "evaluate_every": 1000},
        "optimizer": {"name": "kfac" if interval else "sgd", "learning_rate": 1e-4, "momentum": 0.9},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_minutes": None, "keep": 1, "keep_best": False},
    }
    if interval:
        damping = {"initial": 0.03, "target": 0.03, "warmup_steps": 0, "batchnorm_ratio": 16}
        recipe["kfac"] = {"damping": damping, "refresh": {"schedule": "every", "interval": interval}}
    return recipe


def measure_round(
    arguments: argparse.Namespace, interval: int, folder: Path
) -> tuple[dict[int, dict[str, float]], dict[int, tuple[float, dict[str, float]]]]:
    """By number of ranks the predicted seconds of the stages, and the measured seconds and stages."""
    path, profile = folder / "plan.yaml", folder / "profile.yaml"
    iterations = -(-arguments.iterations // max(1, interval)) * max(1, interval)
    warm = -(-iterations // 4)  # a fifth is left out when the run is read
    path.write_text(strict_yaml.dump(configuration(arguments, interval, iterations + warm)), encoding="utf-8")
    predicted, measured = {}, {}
    for ranks in arguments.ranks:
        command = ["-m", "kfac_dist.commands.plan", str(path), "--measure", str(profile), "--ranks", "1"]
        launch(min(ranks, arguments.cores), command, folder)
        point = Simulation(load_config(path), load_profile(str(profile))).predict(ranks)
        predicted[ranks] = dict(point.stages)
        name = f"plan-{interval}-{ranks}"
        launch(ranks, [str(ROOT / "train.py"), str(path), f"run.output_dir={folder}", f"run.name={name}"], folder)
        found = read_scaling_point(folder / name)
        measured[ranks] = (found.seconds[1], found.stages)
    return predicted, measured


def launch(ranks: int, command: Sequence[str], folder: Path) -> None:
    """Run a program of this package on a number of ranks.

    Raises:
        InputError: If it fails.
    """
    launcher = [str(ROOT / "scripts" / "mpirun.sh"), "-n", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*launcher, sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise InputError(f"{' '.join(command)} on {ranks} ranks failed:\n{finished.stderr.strip()}")


def measure(arguments: argparse.Namespace, interval: int) -> dict[int, Point]:
    """All rounds of one refresh interval, by number of ranks."""
    predicted: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in arguments.ranks}
    measured: dict[int, list[tuple[float, dict[str, float]]]] = {ranks: [] for ranks in arguments.ranks}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            of_round = measure_round(arguments, interval, Path(folder))
        for ranks in arguments.ranks:
            predicted[ranks].append(of_round[0][ranks])
            measured[ranks].append(of_round[1][ranks])
    points = {}
    for ranks in arguments.ranks:
        expected = [sum(stages.values()) for stages in predicted[ranks]]
        taken = [seconds for seconds, _ in measured[ranks]]
        points[ranks] = Point(
            predicted=statistics.median(expected),
            measured=statistics.median(taken),
            ratio=statistics.median(expected) / statistics.median(taken),
            ratios=[first / second for first, second in zip(expected, taken, strict=True)],
            predicted_stages=predicted[ranks][-1],
            measured_stages=measured[ranks][-1][1],
        )
    return points


def tables(arguments: argparse.Namespace, results: dict[str, dict[int, Point]]) -> list[str]:
    """Markdown: seconds and ratios, then the stages."""
    rows = [
        [name, str(ranks), f"{point.predicted:.4f}", f"{point.measured:.4f}", f"{point.ratio:.2f}",
         ", ".join(f"{ratio:.2f}" for ratio in point.ratios)]
        for name, points in results.items()
        for ranks, point in points.items()
    ]  # fmt: skip
    heads = ["optimizer", "ranks", "predicted s/iter", "measured s/iter", "predicted ÷ measured", "of each round"]
    stages = [stage for stage in PLAN_STAGES if stage != "factors"]
    by_stage = []
    for name, points in results.items():
        for ranks, point in points.items():
            expected = point.predicted_stages | {
                "backward": point.predicted_stages["backward"] + point.predicted_stages["factors"]
            }
            for kind, values in (("predicted", expected), ("measured", point.measured_stages)):
                by_stage.append([name, str(ranks), kind, *(f"{1e3 * values[stage]:.1f}" for stage in stages)])
    batch = f"{arguments.slots} slots of {arguments.batch} images of {arguments.image_size} pixels an iteration"
    return [
        f"{arguments.model}, {batch}; rates measured on as many ranks, {arguments.cores} at most; one thread each:",
        "",
        *table(heads, rows),
        "",
        "Milliseconds by stage in the last round (backward with the factors; measured: of rank 0, which waits for the "
        "others within the collectives, and without what lies between the stages):",
        "",
        *table(["optimizer", "ranks", "", *stages], by_stage),
    ]


def main() -> None:
    """Run the command line."""
    parser = create_parser(__doc__ or "")
    parser.add_argument("--model", default="resnet20", help="as for model.name of a recipe; default: resnet20")
    parser.add_argument("--image-size", type=count, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument("--batch", type=count, default=32, help="images of a slot; default: 32")
    parser.add_argument("--slots", type=count, default=4, help="of an iteration, over all ranks; default: 4")
    parser.add_argument("--intervals", type=int, nargs="+", default=[0, 1, 10], help="0 is SGD; default: 0 1 10")
    parser.add_argument("--ranks", type=count, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--cores", type=count, default=2, help="ranks that do not share a core; default: 2")
    parser.add_argument("--iterations", type=count, default=8, help="least that count; default: 8")
    parser.add_argument("--rounds", type=count, default=3, help="default: 3")
    arguments = parser.parse_args()
    environment = describe_run(torch.device("cpu"))
    results: dict[str, dict[int, Point]] = {}
    for interval in arguments.intervals:
        results[f"kfac{interval}" if interval else "sgd"] = measure(arguments, interval)
        found = {name: {ranks: asdict(point) for ranks, point in points.items()} for name, points in results.items()}
        write_record(arguments.output, TITLE, environment, found, tables(arguments, results))
    print("\n".join(tables(arguments, results)))


if __name__ == "__main__":
    run(main)

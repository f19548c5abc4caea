"""`kfac-dist plan` against real iterations: what it predicts from rates measured here, and what training then takes.

    python benchmarks/plan.py --output benchmarks/results/DATE-plan
    python benchmarks/plan.py --model alexnet32 --intervals 1 --ranks 1 2

On each number of ranks one program measures the rates (as `--measure` does), trains a few iterations on images that are
made up, measures again and so on, so that a machine whose speed drifts favours neither. Ranks beyond --cores share
them: those are predicted from the rates measured on --cores ranks, and only trained. Every process has one thread.

Of the iterations the median of those that refresh and of those that do not counts, weighted by the interval.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from program import ROOT, count, create_parser, describe_run, positive, run, table, write_record

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config import strict_yaml
from kfac_dist.config.load import create_config, load_config
from kfac_dist.data.base import Batch
from kfac_dist.errors import InputError
from kfac_dist.planning import measure
from kfac_dist.planning.profile import create_profile
from kfac_dist.planning.simulate import PLAN_STAGES, Simulation
from kfac_dist.plots.curves import stage_seconds
from kfac_dist.training.learner import Learner

_CPU = torch.device("cpu")
TITLE = "A plan beside training"


Seconds = list[tuple[bool, float]]
"""Of each iteration whether it refreshes, and what it took."""


@dataclass(frozen=True)
class Point:
    """A number of ranks: seconds of an iteration, medians over the turns, and seconds of the stages.

    Attributes:
        predicted: From the rates.
        measured: Of training.
        ratio: Of the two.
        ratios: Of each turn, where the rates were measured in the same program.
        predicted_stages: Medians over the turns.
        measured_stages: Of rank 0, typical.
    """

    predicted: float
    measured: float
    ratio: float
    ratios: list[float]
    predicted_stages: dict[str, float]
    measured_stages: dict[str, float]


class TimedLearner(Learner):
    """Trains iterations by the clock."""

    def train(self, batches: Iterator[Batch]) -> tuple[float, dict[str, float]]:
        """One iteration; its seconds, and those of the stages."""
        start = time.perf_counter()
        result = self._train_iteration(self.iteration, batches, lambda: (False, False))
        result.totals.read()
        self.communicator.barrier()
        self.iteration += 1
        return time.perf_counter() - start, result.stages.read()


def take_turns(arguments: argparse.Namespace) -> int:
    """What each rank does: measure and train in turn; rank 0 writes all of it to --turns."""
    communicator = create_communicator(device=_CPU)
    config = load_config(arguments.turns.with_suffix(".yaml"))
    learner = TimedLearner(config, communicator, _CPU)
    batches = learner._batches()
    measure._SECONDS = arguments.seconds
    first = learner.train(batches)
    profiles, turns, stages = [], [], [{"stage_seconds": first[1]}]
    for _ in range(arguments.turn_count):
        if communicator.size <= arguments.cores:
            profiles.append(measure.measure_profile(config, communicator, _CPU).model_dump(mode="json"))
        taken = []
        for _ in range(arguments.iterations):
            fresh = bool(arguments.interval) and learner.iteration % arguments.interval == 0
            seconds, of_stages = learner.train(batches)
            taken.append((fresh, seconds))
            stages.append({"stage_seconds": of_stages})
        turns.append(taken)
    if communicator.is_main:
        found = {"profiles": profiles, "turns": turns, "stages": stage_seconds(stages)}
        arguments.turns.write_text(json.dumps(found), encoding="utf-8")
    return 0


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


def mean_iteration(refresh: float, stale: float, interval: int) -> float:
    """Seconds of an iteration where each `interval`-th refreshes; none does if that is 0."""
    return (refresh + (interval - 1) * stale) / interval if interval else stale


def mean_of(taken: Seconds, interval: int) -> float:
    """The same of iterations that were measured."""
    fresh, stale = ([seconds for is_fresh, seconds in taken if is_fresh == wanted] for wanted in (True, False))
    typical = statistics.median(stale) if stale else 0.0
    return mean_iteration(statistics.median(fresh) if fresh else typical, typical, interval)


def run_ranks(arguments: argparse.Namespace, interval: int, ranks: int) -> dict[str, Any]:
    """What `take_turns` wrote.

    Raises:
        InputError: If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        turns = Path(folder) / "plan.json"
        iterations = 1 + arguments.turn_count * arguments.iterations
        recipe = strict_yaml.dump(configuration(arguments, interval, iterations))
        turns.with_suffix(".yaml").write_text(recipe, encoding="utf-8")
        options = ["--turns", turns, "--interval", interval, "--cores", arguments.cores, "--seconds", arguments.seconds]
        options += ["--iterations", arguments.iterations, "--turn-count", arguments.turn_count]
        launcher = [str(ROOT / "scripts" / "mpirun.sh"), "-n", str(ranks)] if ranks > 1 else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [*launcher, sys.executable, __file__, *map(str, options)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise InputError(f"{ranks} ranks of {arguments.model} failed:\n{finished.stderr.strip()}")
        found: dict[str, Any] = json.loads(turns.read_text(encoding="utf-8"))
        return found


def compare(arguments: argparse.Namespace, interval: int) -> dict[int, Point]:
    """One refresh interval, by number of ranks."""
    found = {ranks: run_ranks(arguments, interval, ranks) for ranks in {*arguments.ranks, arguments.cores}}
    settings = configuration(arguments, interval, 1 + arguments.turn_count * arguments.iterations)
    config = create_config(settings, "the benchmark")
    points = {}
    for ranks in arguments.ranks:
        own = ranks <= arguments.cores
        profiles = found[ranks if own else arguments.cores]["profiles"]
        plans = [Simulation(config, create_profile(profile, "--measure")).predict(ranks) for profile in profiles]
        expected = [mean_iteration(plan.refresh_seconds, plan.stale_seconds, interval) for plan in plans]
        turns = found[ranks]["turns"]
        predicted, measured = statistics.median(expected), mean_of([one for taken in turns for one in taken], interval)
        points[ranks] = Point(
            predicted=predicted,
            measured=measured,
            ratio=predicted / measured,
            ratios=[e / mean_of(taken, interval) for e, taken in zip(expected, turns, strict=True)] if own else [],
            predicted_stages={stage: statistics.median(plan.stages[stage] for plan in plans) for stage in PLAN_STAGES},
            measured_stages=found[ranks]["stages"],
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
    heads = ["optimizer", "ranks", "predicted s/iter", "measured s/iter", "predicted ÷ measured", "of each turn"]
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
        "Milliseconds by stage (backward with the factors; measured: of rank 0, which waits for the "
        "others within the collectives, and without what lies between the stages):",
        "",
        *table(["optimizer", "ranks", "", *stages], by_stage),
    ]


def check_slots(arguments: argparse.Namespace) -> None:
    """Refuse slots that cannot be dealt out evenly.

    Raises:
        InputError: If so.
    """
    together = math.lcm(*arguments.ranks, arguments.cores)
    if arguments.slots % together:
        raise InputError(
            f"--slots must be a multiple of each number of --ranks and of --cores, got {arguments.slots} with "
            f"{', '.join(map(str, arguments.ranks))} and {arguments.cores}: --slots {together} works"
        )


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
    parser.add_argument("--iterations", type=count, default=4, help="of a turn; default: 4")
    parser.add_argument("--turn-count", type=count, default=5, help="default: 5")
    parser.add_argument("--seconds", type=positive, default=0.05, help="least that a rate is measured; default: 0.05")
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)  # what this program gives its ranks
    parser.add_argument("--interval", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turns is not None:
        launch.run(partial(take_turns, arguments))
    check_slots(arguments)
    environment = describe_run(_CPU)
    results: dict[str, dict[int, Point]] = {}
    for interval in arguments.intervals:
        results[f"kfac{interval}" if interval else "sgd"] = compare(arguments, interval)
        found = {name: {ranks: asdict(point) for ranks, point in points.items()} for name, points in results.items()}
        write_record(arguments.output, TITLE, environment, found, tables(arguments, results))
        print("\n".join(tables(arguments, results)), flush=True)


if __name__ == "__main__":
    run(main)

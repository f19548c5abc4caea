"""Figure 2 of the paper, as scripts/slurm/scaling.sbatch makes it: what each number of ranks trains, and what came out.

python benchmarks/scaling.py settings RANKS ITERATIONS CONFIG.yaml [dotted.key=value …]
    Shows overrides for train.py, one a line: as many images a rank as the recipe has, so many iterations, one short
    evaluation, no checkpoint but the last. Those of the command line prevail: with batch.global_size=4096 the
    global batch is the same on any number of ranks.
python benchmarks/scaling.py summarise FOLDER
    Writes scaling.md, scaling.json and figure2.png into the folder, of the finished runs in it.
python benchmarks/scaling.py run FOLDER RANKS[,RANKS…] ITERATIONS CONFIG.yaml [dotted.key=value …]
    Trains all of that on one host by mpirun, each number of ranks with K-FAC and at once with SGD, every rank with one
    thread; and summarises both, FOLDER/kfac and FOLDER/sgd, and in FOLDER/scaling.md one beside the other.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from program import ROOT, count, run, table

from kfac_dist.config.load import load_config
from kfac_dist.data.create import describe_dataset
from kfac_dist.errors import InputError
from kfac_dist.plots import ScalingPoint, describe_runs, draw_scaling, read_scaling_point, save_figure
from kfac_dist.runs.writer import DONE_FILE

_OPTIMIZERS = {"kfac": (), "sgd": ("optimizer.name=sgd", "kfac=null", "weight_rescaling=off")}
_EVALUATED = 256  # images: the accuracy is of no interest


def settings(num_ranks: int, iterations: int, config: str, overrides: list[str]) -> list[str]:
    """Overrides of a recipe for one point of the figure.

    Raises:
        InputError: If the configuration is not valid.
    """
    recipe = load_config(config, overrides)
    found = [f"batch.global_size={recipe.batch.per_rank * num_ranks}", "train.evaluate_every=1000000"]
    found += ["checkpoint.every_minutes=null", "checkpoint.keep=1", "checkpoint.keep_best=false"]
    if "eval_limit" in type(recipe.data).model_fields:
        found.append(f"data.eval_limit={_EVALUATED}")
    taken = {text.partition("=")[0] for text in overrides}  # keys, or whole sections
    found = [text for text in found if not {text.partition("=")[0], text.partition(".")[0]} & taken] + overrides
    point = load_config(config, found)
    images = (iterations - 0.5) * point.batch.global_size  # the number of iterations is rounded up
    return [*found, f"train.epochs={images / describe_dataset(point.data).num_train!r}"]


def markdown(points: list[ScalingPoint], title: str) -> str:
    """The points as a table; the ratio is of images per second and rank to those on the fewest ranks."""
    first = points[0]
    speed_of_first = first.batch_size / first.seconds[1] / first.num_ranks
    rows = []
    for point in points:
        speed = point.batch_size / point.seconds[1]
        low, median, high = (f"{seconds:.4f}" for seconds in point.seconds)
        ratio = speed / point.num_ranks / speed_of_first
        rows.append([str(point.num_ranks), f"{point.batch_size:,}", median, f"{low} to {high}", f"{speed:,.0f}"])
        rows[-1].append(f"{ratio:.2f}")
    heads = ["ranks", "global batch", "s per iteration", "middle half", "images per second", "a rank, to the first"]
    stages = list(first.stages)
    by_stage = [[str(point.num_ranks), *(f"{point.stages[stage]:.4f}" for stage in stages)] for point in points]
    lines = [f"# Figure 2: {title}", "", *table(heads, rows), "", "Seconds by stage:", ""]
    return "\n".join([*lines, *table(["ranks", *stages], by_stage)]) + "\n"


def summarise(folder: Path) -> list[ScalingPoint]:
    """Write the table and the figure; and return the points.

    Raises:
        InputError: If no run in the folder is finished.
    """
    runs = [marker.parent for marker in sorted(folder.glob(f"*/{DONE_FILE}"))]
    if not runs:
        raise InputError(f"FOLDER must hold finished runs, got {folder}")
    points = sorted(map(read_scaling_point, runs), key=lambda point: point.num_ranks)
    text = markdown(points, describe_runs(runs))
    print(text, end="")
    (folder / "scaling.md").write_text(text, encoding="utf-8")
    (folder / "scaling.json").write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n", "utf-8")
    save_figure(draw_scaling(points, describe_runs(runs)), folder / "figure2.png")
    return points


def run_here(folder: Path, numbers: list[int], iterations: int, config: str, overrides: list[str]) -> None:
    """Train on each number of ranks of this host, K-FAC and SGD in turn, and compare them.

    Raises:
        InputError: If the configuration is not valid, or the folder holds runs.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    there = [path for name in _OPTIMIZERS for path in sorted((folder / name).glob("*"))]
    if there:
        raise InputError(f"FOLDER must hold no earlier runs, got {folder} with {there[0]}: give another, or delete it")
    for number in numbers:
        for name, changes in _OPTIMIZERS.items():
            kept = [text for text in overrides if name == "kfac" or not text.startswith("kfac.")]
            found = settings(number, iterations, config, [*kept, *changes])
            found += [f"run.output_dir={folder / name}", f"run.name=ranks-{number}"]
            program = [sys.executable, str(ROOT / "train.py"), config, *found]
            subprocess.run(
                [str(ROOT / "scripts" / "mpirun.sh"), "-n", str(number), *program], env=environment, check=True
            )
    points = {name: summarise(folder / name) for name in _OPTIMIZERS}
    seconds = [[point.seconds[1] for point in found] for found in points.values()]
    rows = [
        [str(number), f"{kfac:.4f}", f"{sgd:.4f}", f"{kfac / sgd:.2f}"]
        for number, kfac, sgd in zip(numbers, *seconds, strict=True)
    ]
    cores = f"{len(os.sched_getaffinity(0))} cores, one thread a rank, so more ranks than cores share them"
    heads = ["ranks", "K-FAC, s per iteration", "SGD, s per iteration", "K-FAC ÷ SGD"]
    text = "\n".join([f"# K-FAC beside SGD on more and more ranks ({cores})", "", *table(heads, rows)]) + "\n"
    print(text, end="")
    (folder / "scaling.md").write_text(text, encoding="utf-8")


def numbers_of_ranks(text: str) -> list[int]:
    """1,2,4 as a list, each number once, ascending."""
    return sorted({count(part) for part in text.split(",")})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "show overrides for train.py, one a line"
    shown = commands.add_parser("settings", help=text, description=f"Part of scaling.py: {text}.")
    shown.add_argument("ranks", type=count, metavar="RANKS", help="number of ranks that will train")
    text = "write scaling.md, scaling.json and figure2.png of finished runs"
    written = commands.add_parser("summarise", help=text, description=f"Part of scaling.py: {text}.")
    written.add_argument("folder", type=Path, metavar="FOLDER", help="holds the runs' folders; the files go there, too")
    text = "train on this host by mpirun, with K-FAC and with SGD, and summarise both"
    here = commands.add_parser("run", help=text, description=f"Part of scaling.py: {text}.")
    here.add_argument("folder", type=Path, metavar="FOLDER", help="for runs and results; must hold no earlier runs")
    here.add_argument("ranks", type=numbers_of_ranks, metavar="RANKS[,RANKS…]", help="numbers of ranks, such as 1,2,4")
    for command in (shown, here):
        command.add_argument("iterations", type=count, metavar="ITERATIONS", help="of each run")
        command.add_argument(
            "config", metavar="CONFIG.yaml", help="recipe of the K-FAC run: a file, or a recipe's name"
        )
        command.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the recipe")
    options = parser.parse_args()
    if options.command == "summarise":
        summarise(options.folder)
    elif options.command == "run":
        run_here(options.folder, options.ranks, options.iterations, options.config, options.overrides)
    else:
        print("\n".join(settings(options.ranks, options.iterations, options.config, options.overrides)))


if __name__ == "__main__":
    run(main)

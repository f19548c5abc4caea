"""The command line of the figures.

python -m kfac_dist.plots curves  RUN [RUN ...] --output FILE.png [--labels LABEL ...]
python -m kfac_dist.plots figure2 RUN [RUN ...] --output FILE.png
python -m kfac_dist.plots figure3 RUN [RUN ...] --output FILE.png [--labels LABEL ...]
python -m kfac_dist.plots figure4 [MODEL] --output FILE.png
python -m kfac_dist.plots figure5 RUN --output FILE.png
python -m kfac_dist.plots figure6 RUN [RUN ...] --output FILE.png [--labels LABEL ...]
python -m kfac_dist.plots batch   CONFIG.yaml [dotted.key=value ...] --output FILE.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from kfac_dist.models import create_model
from kfac_dist.planning.memory import fisher_memory
from kfac_dist.plots.accuracy import batch_label, draw_top1_and_learning_rate, fisher_label
from kfac_dist.plots.batch import draw_batch
from kfac_dist.plots.curves import draw_curves
from kfac_dist.plots.fisher_change import draw_fisher_change
from kfac_dist.plots.fisher_memory import draw_fisher_memory
from kfac_dist.plots.runs import describe_runs, read_run, save_figure
from kfac_dist.plots.scaling import draw_scaling, read_scaling_point

_MOST_IMAGES = 256  # takes about half a minute to draw, and 16,800 pixels of height with all steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: Those of `kfac-dist plots`; by default this process's command line.
    """
    program = "python -m kfac_dist.plots" if arguments is None else "kfac-dist plots"
    options = _parser(program).parse_args(arguments)
    try:
        save_figure(_draw(options), options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Draw figures of runs and data.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("curves", "accuracy, learning rate, loss and stage seconds of runs"),
        ("figure3", "the paper's Figure 3: top-1 and learning rate of runs against iteration and epoch"),
        ("figure6", "the paper's Figure 6: the same, named by BatchNorm Fisher and refresh schedule"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (it holds metrics.jsonl)")
        command.add_argument("--labels", nargs="+", metavar="LABEL", help="a name for each run, in order")
    command = commands.add_parser("figure2", help="the paper's Figure 2: seconds an iteration of runs by their ranks")
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run; scripts/slurm/scaling.sbatch makes them"
    )
    command = commands.add_parser("figure4", help="the paper's Figure 4: memory of the Fisher by BatchNorm form")
    command.add_argument("model", nargs="?", default="resnet50", help="any name that model.name takes (resnet50)")
    command.add_argument("--image-size", type=int, default=224, metavar="N", help="(224)")
    command.add_argument("--classes", type=int, default=1000, metavar="N", help="(1000)")
    command = commands.add_parser("figure5", help="the paper's Figure 5: percentiles of Diff over layers")
    command.add_argument("run", metavar="RUN", help="folder of a run with kfac.monitor.diff=true")
    command = commands.add_parser("batch", help="a training batch before and after crop, mixup and erasing")
    command.add_argument("config", help="YAML file, or a recipe's name")
    command.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="change a key of the file")
    command.add_argument("--iteration", type=int, default=3, metavar="N", help="which iteration's batch (3)")
    command.add_argument("--images", type=int, default=8, metavar="N", help="how many of its images (8)")
    for command in commands.choices.values():
        command.add_argument("--output", required=True, type=Path, metavar="FILE", help="figure to write: FILE.png")
    return parser


def _draw(options: argparse.Namespace) -> Figure:
    if options.command == "batch":
        if options.iteration < 0 or not 1 <= options.images <= _MOST_IMAGES:
            raise InputError(
                f"--iteration must be >= 0, and --images in 1 ... {_MOST_IMAGES}, "
                f"got {options.iteration} and {options.images}"
            )
        return draw_batch(load_config(options.config, options.overrides), options.iteration, options.images)
    if options.command == "figure2":
        return draw_scaling([read_scaling_point(run) for run in options.runs], describe_runs(options.runs))
    if options.command == "figure4":
        if options.image_size < 1 or options.classes < 1:
            raise InputError(f"--image-size and --classes must be >= 1, got {options.image_size} and {options.classes}")
        model = create_model(options.model, options.classes, (3, options.image_size, options.image_size), seed=0)
        return draw_fisher_memory(options.model, fisher_memory(model))
    if options.command == "figure5":
        return draw_fisher_change(options.run)
    labels = options.labels or [None] * len(options.runs)
    if len(labels) != len(options.runs):
        raise InputError(f"--labels must name each of the {len(options.runs)} runs, got {len(labels)} labels")
    if options.command in ("figure3", "figure6"):
        name = batch_label if options.command == "figure3" else fisher_label
        labels = [label or name(run) for run, label in zip(options.runs, labels, strict=True)]
        labels = [
            f"{label}, {Path(run).resolve().name}" if label and labels.count(label) > 1 else label
            for run, label in zip(options.runs, labels, strict=True)
        ]
    runs = [read_run(run, label) for run, label in zip(options.runs, labels, strict=True)]
    if options.command == "curves":
        return draw_curves(runs, describe_runs(options.runs))
    return draw_top1_and_learning_rate(runs)

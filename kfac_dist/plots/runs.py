"""What every figure of runs needs: their records, their names, colours, and a file to write to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kfac_dist.errors import InputError
from kfac_dist.runs.reader import CONFIG_FILE, read_metrics

Array = NDArray[np.float64]

# Colours after Okabe and Ito, which colour-blind readers can tell apart.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")  # learning rates often coincide; the one below stays visible
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Run:
    """What a figure needs of one run.

    Attributes:
        label: Name in the legend.
        train: Its ``train`` records, at least one.
        evaluations: Its ``eval`` records.
    """

    label: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def read_run(directory: str | Path, label: str | None = None) -> Run:
    """Read a run's records; the label is the folder's name unless given.

    Raises:
        InputError: If the folder has no metrics.jsonl, or no training iteration is recorded in it.
    """
    records = read_metrics(directory)
    train = [record for record in records if record.get("kind") == "train"]
    if not train:
        raise InputError(f"{directory}: no training iteration is recorded yet; draw it when the run has made one")
    evaluations = [record for record in records if record.get("kind") == "eval"]
    return Run(label or Path(directory).resolve().name, train, evaluations)


def column(records: Sequence[Mapping[str, Any]], field: str) -> Array:
    """One field of all records; not a number where a record lacks it. "Infinity" is read as such."""
    return np.array([float(record.get(field, "NaN")) for record in records], dtype=np.float64)


def start_epochs(train: Sequence[Mapping[str, Any]]) -> Array:
    """Epoch at the start of each iteration, where its learning rate belongs; a record's `epoch` is at its end."""
    iterations = column(train, "iteration")
    return column(train, "epoch") * iterations / (iterations + 1)


def put_legend_beside(axes: Axes, title: str | None = None) -> None:
    """A legend to the right of the axes, where it covers no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=title, title_fontsize=8, fontsize=8)


def describe_runs(directories: Sequence[str | Path]) -> str:
    """A title: model, data and batch size where all runs' config.yaml agree on them."""
    parts = []
    configs = [read_config(Path(directory)) for directory in directories]
    for section, key, form in (
        ("model", "name", "{}"),
        ("data", "name", "on {}"),
        ("batch", "global_size", "batch {}"),
    ):
        values = {str((config.get(section) or {}).get(key, "")) for config in configs}
        if len(values) == 1 and values != {""}:
            parts.append(form.format(values.pop()))
    return ", ".join(parts).replace(", on ", " on ") or "Training curves"


def read_config(directory: Path) -> dict[str, Any]:
    """A run's resolved configuration; empty where it cannot be read."""
    try:
        config = yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}  # titles and names only: a run copied without its configuration can still be drawn
    return config if isinstance(config, dict) else {}


def save_figure(figure: Figure, output: Path) -> None:
    """Write the figure; its format follows from the file's ending.

    Raises:
        InputError: If the ending is no known format, or the file cannot be written.
    """
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix.lstrip(".").lower() not in formats:
        raise InputError(f"--output must end in one of {', '.join(sorted(formats))}, got {str(output)!r}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise InputError(f"--output: cannot write {output} ({error.strerror})") from error

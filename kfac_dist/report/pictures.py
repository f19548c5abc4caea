"""What all pictures share: size, colours, and the way to SVG.

A picture is about as wide as a phone, so that its text stays readable there; wider screens show several in a row. Text
and axes have the one colour `INK`, which is legible on white and on black; inside an HTML page it becomes the page's
text colour.
"""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from kfac_dist.report.document import Panel

INK = "#7c8187"
WIDTH, HEIGHT = 4.2, 3.0  # inches; 72 points an inch, so 302 points

# Colours of Okabe and Ito, which colour-blind readers can tell apart; each optimizer has its own in every figure.
_COLOURS = {
    "kfac": "#0072B2",
    "sgd": "#D55E00",
    "muon": "#009E73",
    "adamw": "#CC79A7",
    "lars": "#E69F00",
}
_SPARE_COLOURS = ("#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#8F6BD1", "#A0762A", "#D55E00", "#0072B2")
_MARKERS = "osD^vPX*"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "kfac_dist",
}


@dataclass(frozen=True)
class Look:
    """How an optimizer or a group of runs looks: colour, and a marker for those who see no colours."""

    colour: str
    marker: str


def looks_of(kinds: Mapping[str, str]) -> dict[str, Look]:
    """A look for each label; the first of each known optimizer has the optimizer's own colour.

    Args:
        kinds: Label → optimizer's name, or anything else.
    """
    colours: dict[str, str] = {}
    for label, kind in kinds.items():
        if kind in _COLOURS and _COLOURS[kind] not in colours.values():
            colours[label] = _COLOURS[kind]
    spare = [colour for colour in _SPARE_COLOURS if colour not in colours.values()] or list(_SPARE_COLOURS)
    for label in kinds:
        if label not in colours:
            colours[label] = spare.pop(0)
            spare = spare or list(_SPARE_COLOURS)
    return {label: Look(colours[label], _MARKERS[index % len(_MARKERS)]) for index, label in enumerate(kinds)}


def draw(name: str, alt: str, fill: Callable[[Axes], None], height: float = HEIGHT, legend: bool = True) -> Panel:
    """A picture of one pair of axes; its legend stands above them, where it covers nothing.

    Args:
        name: Of the panel.
        alt: What it shows.
        fill: Draws into the axes.
        height: In inches.
        legend: Whether labelled lines get one.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        fill(axes)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            columns = 4 if max(map(len, labels)) < 10 else 3 if max(map(len, labels)) < 16 else 2
            figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
        return Panel(slug(name), _svg(figure), alt)


def slug(text: str) -> str:
    """For ids and files: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)


def batch_axis(axes: Axes, sizes: list[int]) -> None:
    """A logarithmic axis with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = sizes if len(sizes) <= 6 else sizes[::2]
    axes.set_xticks(shown, [short(size) for size in shown])
    axes.set_xlabel("batch size")


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis whose numbers read as numbers, also where it spans less than a decade.

    It stays linear where nothing positive is drawn.
    """
    if not np.isfinite(axes.dataLim.minposx if which == "x" else axes.dataLim.minposy):
        return
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    decades = np.log10(high / low)
    bases = (1, 2, 3, 5) if decades < 1.2 else (1, 3) if decades < 2.5 else (1,)
    ticks = [base * 10.0**power for power in range(-12, 13) for base in bases]
    axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    axis.set_minor_locator(NullLocator())


def plain(value: float) -> str:
    """A number as short as it can be read: 0.03, 20, 1,500, 3e-05."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short(size: float) -> str:
    """A batch size on an axis: 512, 1k, 64k."""
    return f"{size / 1024:.0f}k" if size >= 1024 and size % 1024 == 0 else f"{size:.0f}"

"""Numbers as texts of tables."""

import math

from kfac_dist.report.best import Best, Reached, Spread
from kfac_dist.report.pictures import plain

NONE = "–"
UNEVEN = "Something else used the machine, or machines differed: do not compare seconds."


def decimal(value: float, digits: int) -> str:
    """A number with so many decimals; a dash where there is none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else NONE


def spread(values: Spread, digits: int) -> str:
    """The mean; with several seeds also the lowest, the highest, and of how many: those that have a value."""
    text = decimal(values.mean, digits)
    if len(values.values) == 1 or text == NONE:
        return text
    known = sum(map(math.isfinite, values.values))
    number = f"{known} of {len(values.values)}" if known < len(values.values) else f"{known}"
    return f"{text} ({values.lowest:.{digits}f} … {values.highest:.{digits}f}, n = {number})"


def parameters(best: Best) -> str:
    """The chosen configuration; a star marks a value at the edge of its grid."""
    names = {"learning_rate": "lr"}
    return ", ".join(
        f"{names.get(name, name)} {plain(value)}{'*' if name in best.at_edge else ''}"
        for name, value in sorted(best.chosen.parameters.items(), key=lambda item: (item[0] != "learning_rate", item))
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def reached(times: Reached, whole: Best) -> list[str]:
    """Epochs, iterations and seconds; how many runs came there if not all did.

    In brackets: how many times the length of whole runs, in epochs and in seconds (mean over seeds), that is.
    """
    if not times.num_reached:
        return ["not reached", NONE, NONE]
    some = f", {times.num_reached} of {times.num_runs} runs" if times.num_reached < times.num_runs else ""
    epochs = f"{times.epochs:.1f} ({times.epochs / whole.chosen.epochs:.2f} ×){some}"
    seconds = times.seconds / Spread(tuple(trial.seconds for trial in whole.trials)).mean
    return [epochs, decimal(times.iterations, 0), f"{times.seconds:,.1f} ({seconds:.2f} ×)"]

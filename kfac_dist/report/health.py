"""How a run's curvature fared: eigenvalues, damping, staleness, and what went wrong on the way."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_dist.report.curve import Array, number
from kfac_dist.report.runs import RunRecord

Records = Sequence[Mapping[str, Any]]

EVENTS = {
    "retry": "iterations in which a factorisation needed more damping",
    "overflow": "updates skipped because gradients overflowed",
    "nonfinite": "iterations with a loss that is not finite",
    "restored": "returns to the last checkpoint",
    "resumed": "starts from a checkpoint",
    "checkpoint_failed": "checkpoints that could not be written",
    "skipped_picture": "images skipped",
}


def _order(item: tuple[str, object]) -> tuple[int, str]:
    """A, G, F, then others."""
    return "AGF".find(item[0]) % 4, item[0]


@dataclass(frozen=True)
class Staleness:
    """Iterations from one refresh of a kind of matrix to the next, over layers and the whole run.

    Attributes:
        shortest: Of all.
        mean: Of all.
        longest: Of all.
        refreshes: How many there were, over all layers.
    """

    shortest: int
    mean: float
    longest: int
    refreshes: int


def staleness(fisher: Records) -> dict[str, Staleness]:
    """By kind of matrix (A, G, F), from Diff records: there is one for each refresh but a matrix's first."""
    iterations: dict[tuple[str, str], list[int]] = defaultdict(list)
    for record in fisher:
        if "diff" in record:
            iterations[str(record["matrix"]), str(record["layer"])].append(int(record["iteration"]))
    intervals: dict[str, list[int]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for (matrix, _), found in iterations.items():
        intervals[matrix] += np.diff(found).tolist()
        counts[matrix] += len(found)
    return {
        matrix: Staleness(min(found), float(np.mean(found)), max(found), counts[matrix])
        for matrix, found in sorted(intervals.items(), key=_order)
        if found
    }


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one kind of matrix over its layers, by iteration.

    Attributes:
        iterations: At which they were looked at, (n,).
        smallest: The smallest over the layers, (n,); rounding may make it negative.
        largest: The largest over the layers, (n,).
        median_largest: The median over the layers of each one's largest, (n,).
        rank: Median effective rank over the layers, (n,).
    """

    iterations: Array
    smallest: Array
    largest: Array
    median_largest: Array
    rank: Array


def spectra(fisher: Records) -> dict[str, Spectrum]:
    """By kind of matrix."""
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in fisher:
        if "largest_eigenvalue" in record:
            values = (record["smallest_eigenvalue"], record["largest_eigenvalue"], record["effective_rank"])
            smallest, largest, rank = map(number, values)
            found[str(record["matrix"])][int(record["iteration"])].append((smallest, largest, rank))
    result = {}
    for matrix, by_iteration in sorted(found.items(), key=_order):
        tables = [np.array(by_iteration[iteration]) for iteration in sorted(by_iteration)]
        result[matrix] = Spectrum(
            np.array(sorted(by_iteration), dtype=np.float64),
            np.array([table[:, 0].min() for table in tables]),
            np.array([table[:, 1].max() for table in tables]),
            np.array([np.median(table[:, 1]) for table in tables]),
            np.array([np.median(table[:, 2]) for table in tables]),
        )
    return result


def relative_damping(train: Records, fisher: Records) -> tuple[Array, Array]:
    """Damping beside the curvature: γ / (λ_max(A) · λ_max(G)), the median over Kronecker-factored layers.

    λ_max(A) · λ_max(G) is the largest eigenvalue of a layer's Fisher block. Far above 1 the damping makes K-FAC a
    scaled SGD; far below, it touches only directions of small curvature.

    Returns:
        Iterations and ratios, (n,) each.
    """
    damping = {int(record["iteration"]): number(record.get("damping")) for record in train}
    largest: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for record in fisher:
        if "largest_eigenvalue" in record:
            largest[int(record["iteration"]), str(record["layer"])][str(record["matrix"])] = number(
                record["largest_eigenvalue"]
            )
    ratios: dict[int, list[float]] = defaultdict(list)
    for (iteration, _), factors in largest.items():
        if {"A", "G"} <= factors.keys() and iteration in damping and factors["A"] * factors["G"] > 0:
            ratios[iteration].append(damping[iteration] / (factors["A"] * factors["G"]))
    iterations = sorted(ratios)
    return np.array(iterations, dtype=np.float64), np.array([np.median(ratios[iteration]) for iteration in iterations])


def event_rows(run: RunRecord) -> list[list[str]]:
    """What went out of the ordinary: text, how often, and the first iterations."""
    by_event: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in run.records.get("event", ()):
        by_event[str(record.get("event"))].append(record)
    rows = []
    for event in [*EVENTS, *sorted(by_event.keys() - EVENTS.keys())]:
        records = by_event.get(event, [])
        places = ", ".join(f"{record.get('iteration', '?'):,}" for record in records[:6])
        rows.append([EVENTS.get(event, event), str(len(records)), places + (" …" if len(records) > 6 else "")])
        if event == "retry":
            for field, text in (("retries", "factorisations repeated"), ("kept_inverses", "old inverses kept")):
                rows.append([text, str(sum(int(record.get(field, 0)) for record in records)), ""])
    return rows

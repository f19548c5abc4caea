"""Figures of the step benchmark, and tables of them."""

from dataclasses import asdict, dataclass

from program import table
from work import Ceilings, Traffic

from kfac_dist.timing import STAGES

BASELINES = ("torch", "sgd")


@dataclass(frozen=True)
class StepFigures:
    """Results of a workload, by candidate.

    Attributes:
        seconds: Median seconds per step.
        rounds: Seconds per step in each round.
        ratio_to_baseline: Of the medians, to the fastest SGD.
        stage_seconds: Median seconds per step by stage, of rank 0.
        operations: Floating-point operations per step by stage, of rank 0.
        traffic: Bytes of the collectives of a step with a refresh, each with what its formula says; of K-FAC.
        ceilings: Rates to hold the stages' against, of rank 0.
        peak_bytes: Most GPU memory that it needs if alone; 0 on a CPU.
        peak_bytes_beyond_sgd: The same less what `sgd` needs.
    """

    seconds: dict[str, float]
    rounds: dict[str, list[float]]
    ratio_to_baseline: dict[str, float]
    stage_seconds: dict[str, dict[str, float]]
    operations: dict[str, dict[str, float]]
    traffic: Traffic | None
    ceilings: Ceilings
    peak_bytes: dict[str, int]
    peak_bytes_beyond_sgd: dict[str, int]


def tables(figures: dict[str, StepFigures]) -> list[str]:
    """Markdown; a row for each workload, and for each of its candidates by stage."""
    names = list(next(iter(figures.values())).seconds)
    rows = [
        [workload, *(f"{1e3 * of.seconds[name]:.1f} ({of.ratio_to_baseline[name]:.2f}×)" for name in names)]
        for workload, of in figures.items()
    ]
    lines = [
        "Milliseconds per step (and times the faster SGD); kfacN refreshes the Fisher every N steps, "
        "@F from a fraction of the batch:",
        "",
        *table(["workload", *names], rows),
    ]
    if any(any(of.peak_bytes.values()) for of in figures.values()):
        rows = [
            [workload, *(f"{of.peak_bytes[n] / 2**20:.0f} ({of.peak_bytes_beyond_sgd[n] / 2**20:+.0f})" for n in names)]
            for workload, of in figures.items()
        ]
        lines += ["", "Peak MiB of GPU memory (and beyond sgd's):", "", *table(["workload", *names], rows)]
    stages = [stage for stage in STAGES if stage != "data"]
    rows = [
        [workload, name, *(f"{1e3 * of.stage_seconds[name][stage]:.2f}" for stage in stages)]
        for workload, of in figures.items()
        for name in names
    ]
    lines += ["", "Milliseconds per step by stage:", "", *table(["workload", "optimizer", *stages], rows)]
    heads = ["workload", "optimizer", "stage", "ms", "GFLOP", "GFLOP/s", "of the ceiling"]
    rates = [row for workload, of in figures.items() for row in _rate_rows(workload, of)]
    lines += ["", "Operations of the stages that calculate, and rates:", "", *table(heads, rates)]
    for workload, of in figures.items():
        lines += ["", f"{workload}: {_ceiling_line(of.ceilings)}", "", _traffic_line(of.traffic)]
    return lines


def stages_with_factors(figures: dict[str, StepFigures]) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by stage, by optimizer, by workload; of K-FAC the factors apart from the backward."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for workload, of in figures.items():
        plain = of.stage_seconds["sgd"]["backward"]
        found[workload] = {}
        for name, seconds in of.stage_seconds.items():
            beyond = 0.0 if name in BASELINES else max(0.0, seconds["backward"] - plain)
            found[workload][name] = seconds | {"backward": seconds["backward"] - beyond, "factors": beyond}
    return found


def _rate_rows(workload: str, of: StepFigures) -> list[list[str]]:
    """Rows for the stages of each optimizer that calculate; of K-FAC its factors apart from the backward."""
    training = of.ceilings.half_product or of.ceilings.product
    rows = []
    for name, operations in of.operations.items():
        if name == "torch":
            continue
        seconds = of.stage_seconds[name]
        figures = {stage: (seconds[stage], operations[stage], training) for stage in ("forward", "backward")}
        if name != "sgd":
            plain = of.stage_seconds["sgd"]["backward"], of.operations["sgd"]["backward"]
            figures["backward"] = (*plain, training)
            figures["factors"] = seconds["backward"] - plain[0], operations["backward"] - plain[1], training
            figures["inverse"] = seconds["inverse"], operations["inverse"], of.ceilings.cholesky
            figures["precondition"] = seconds["precondition"], operations["precondition"], of.ceilings.product
        for stage, (taken, count_of, ceiling) in figures.items():
            if count_of > 0 and taken > 0:
                rate = count_of / taken
                figure = [f"{1e3 * taken:.1f}", f"{count_of / 1e9:.2f}", f"{rate / 1e9:.0f}", f"{rate / ceiling:.0%}"]
                rows.append([workload, name, stage, *figure])
    return rows


def _ceiling_line(of: Ceilings) -> str:
    half = "" if of.half_product is None else f", in half precision {of.half_product / 1e9:.0f}"
    return (
        f"one large product {of.product / 1e9:.0f} GFLOP/s{half}, one Cholesky factorisation {of.cholesky / 1e9:.0f}, "
        f"a copy {of.memory / 1e9:.1f} GB/s."
    )


def _traffic_line(of: Traffic | None) -> str:
    assert of is not None  # the last candidate is K-FAC's
    parts = [f"{name} {sent:,} bytes (formula {formula:,})" for name, (sent, formula) in asdict(of).items()]
    return f"Each rank gives to the collectives of a step with a refresh: {', '.join(parts)}."

"""A plan as text for the screen."""

from kfac_dist.communicator.base import ranks_in_words
from kfac_dist.config.schema import Config
from kfac_dist.planning.plan import PAYS_FROM, Plan
from kfac_dist.planning.profile import Profile
from kfac_dist.planning.simulate import PLAN_STAGES, Prediction

_HEADS = {
    "forward": "forw",
    "backward": "backw",
    "factors": "fact",
    "reduce_scatter": "reduce",
    "inverse": "inv",
    "precondition": "prec",
    "all_gather": "gather",
    "update": "upd",
}


def describe_plan(plan: Plan, config: Config, profile: Profile, name: str) -> str:
    """The table, and what follows from it."""
    heads = ["ranks", "nodes", "slots", "batch", "refresh", "s/iter"]
    heads += [*(f"{_HEADS[stage]} %" for stage in PLAN_STAGES), "SGD s", "effic. %", "MiB/rank", "time"]
    rows = [heads]
    for number, point in enumerate(plan.points):
        shares = [f"{100 * point.stages[stage] / point.seconds:.0f}" for stage in PLAN_STAGES]
        memory = _mebibytes(point) + ("" if plan.fits[number] else "!")
        rows.append(
            [str(point.num_ranks), str(plan.nodes[number]), str(point.slots), str(point.batch), _interval(point),
             f"{point.seconds:.4g}", *shares, f"{point.sgd_seconds:.4g}", f"{100 * plan.efficiencies[number]:.0f}",
             memory, duration(3600 * point.hours)]
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        f"{config.run.name}: {config.model.name} on {config.data.name}, {config.optimizer.name}, "
        f"{config.train.precision}, {_iterations(plan)} iterations",
        f"profile {name}: {profile.description}",
        "",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        "",
        "refresh: iterations for each refresh of the Fisher; %: shares of the iteration; effic.: images a second and",
        "rank beside the best row's; MiB/rank: memory of the fullest rank, of the profile's "
        f"{1024 * profile.memory.gibibytes:,.0f} MiB;",
        "time: of all iterations, without evaluation, checkpoints and waiting for data",
        "predicted from the profile's rates, not measured: each one's source is in the profile, and in --json",
    ]
    if config.optimizer.name not in ("kfac", "sgd"):
        lines.append(f"{config.optimizer.name} is predicted as SGD: what its own update takes, and keeps, is left out")
    if not all(plan.fits):
        lines.append(f"!: more than the {profile.memory.gibibytes:g} GiB that there are")
    return "\n".join([*lines, "", *_advice(plan, config)])


def _advice(plan: Plan, config: Config) -> list[str]:
    if plan.best is None or plan.fastest is None:
        return ["no number of ranks has the memory: set a smaller batch.per_rank"]
    best, fastest = plan.points[plan.best], plan.points[plan.fastest]
    lines = [f"best: {_costs(best)}"]
    if fastest.num_ranks != best.num_ranks:
        lines.append(f"fastest: {_costs(fastest)}")
    if plan.stops_paying is None:
        lines.append(f"more ranks pay up to {plan.points[-1].num_ranks}, where this table ends")
    else:
        lines.append(
            f"stops paying: at {plan.stops_paying} ranks a rank is less than {PAYS_FROM:.0%} as fast as at best"
        )
    if plan.intervals:
        seconds = ", ".join(f"{interval}: {value:.4g}" for interval, value in plan.intervals.items())
        lines += [
            f"refresh on {ranks_in_words(best.num_ranks)}, s/iter by interval: {seconds}",
            f"best refresh interval: {plan.best_interval} (the shortest within 10 % of the longest; SGD takes "
            f"{best.sgd_seconds:.4g} s)",
        ]
    if plan.best_slot_size is not None:
        point = plan.slot_sizes[plan.best_slot_size]
        text = f"best slots: batch.per_rank={plan.best_slot_size} in {point.slots}, {point.seconds:.4g} s/iter"
        if plan.best_slot_size != config.batch.per_rank:
            text += f" (not {config.batch.per_rank} as configured; BatchNorm then sees as many images at once)"
        lines.append(text)
    return lines


def _interval(point: Prediction) -> str:
    return "-" if point.refresh_interval == float("inf") else f"{point.refresh_interval:.3g}"


def _iterations(plan: Plan) -> str:
    first, last = plan.points[0].num_iterations, plan.points[-1].num_iterations
    return f"{first}" if first == last else f"{first} to {last}"


def _costs(point: Prediction) -> str:
    return (
        f"{ranks_in_words(point.num_ranks)}, slots on each: {point.slots}; {point.seconds:.4g} s/iter, "
        f"{_mebibytes(point)} MiB/rank, {duration(3600 * point.hours)} in all"
    )


def _mebibytes(point: Prediction) -> str:
    return f"{point.memory_bytes / 2**20:.0f}"


def duration(seconds: float) -> str:
    """Seconds as one reads them: 0.098 s, 1.3 s, 4 min 10 s, 3.2 h."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return f"{seconds / 3600:,.1f} h"

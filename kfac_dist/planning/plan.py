"""What a simulation over numbers of ranks comes to: which number, slots and refresh interval are best."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kfac_dist.config.kfac import EveryRefresh
from kfac_dist.config.load import batch_slots
from kfac_dist.config.schema import BatchConfig, Config
from kfac_dist.errors import InputError
from kfac_dist.planning.network import Fabric
from kfac_dist.planning.profile import Profile
from kfac_dist.planning.simulate import Prediction, Simulation

MOST_RANKS = 4096
PAYS_FROM = 0.5
"""Least speed of a rank, beside the best number's, at which more ranks pay."""
INTERVALS = (1, 2, 5, 10, 20, 50)
_CLOSE = 1.1  # a longer interval that saves less than this is not worth a staler Fisher
_SLOT_FACTORS = (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class Plan:
    """Predictions and what follows from them.

    Attributes:
        points: By number of ranks, ascending.
        efficiencies: Images a second and rank of each point, beside those of the best.
        fits: Whether each point's memory is there.
        nodes: Nodes of each point.
        best: Number of the point with the most ranks that pay and fit; None if none fits.
        fastest: Number of the fitting point with the shortest run; None if none fits.
        stops_paying: Ranks of the first point behind the most efficient one that does not pay; None if all do.
        intervals: Seconds of an iteration on the best number of ranks by refresh interval; empty without K-FAC.
        best_interval: The shortest of them that is within 10 % of the longest's speed; None without K-FAC.
        slot_sizes: On the best number of ranks, by `batch.per_rank`, the prediction.
        best_slot_size: The fastest of them that fits; None if none does.
    """

    points: list[Prediction]
    efficiencies: list[float]
    fits: list[bool]
    nodes: list[int]
    best: int | None
    fastest: int | None
    stops_paying: int | None
    intervals: dict[int, float]
    best_interval: int | None
    slot_sizes: dict[int, Prediction]
    best_slot_size: int | None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        points = [
            {
                **asdict(point),
                "seconds": point.seconds,
                "hours": point.hours,
                "memory_bytes": point.memory_bytes,
                "refresh_interval": point.refresh_interval if point.refresh_interval != float("inf") else None,
                "efficiency": efficiency,
                "fits": fits,
                "nodes": nodes,
            }
            for point, efficiency, fits, nodes in zip(
                self.points, self.efficiencies, self.fits, self.nodes, strict=True
            )
        ]
        slots = {
            size: {"slots": point.slots, "seconds": point.seconds, "memory_bytes": point.memory_bytes}
            for size, point in self.slot_sizes.items()
        }
        return {
            "points": points,
            "best_ranks": None if self.best is None else self.points[self.best].num_ranks,
            "fastest_ranks": None if self.fastest is None else self.points[self.fastest].num_ranks,
            "stops_paying_at_ranks": self.stops_paying,
            "seconds_by_refresh_interval": self.intervals,
            "best_refresh_interval": self.best_interval,
            "slot_sizes": slots,
            "best_per_rank": self.best_slot_size,
        }


def make_plan(config: Config, profile: Profile, ranks: Sequence[int] | None, grow_batch: bool) -> Plan:
    """Predict a run on numbers of ranks.

    Args:
        config: A validated configuration.
        profile: The machine.
        ranks: Which numbers; powers of two up to 4,096 over which the batch divides if None.
        grow_batch: Whether each rank takes one slot of `batch.per_rank`, so that the batch grows with the ranks, as in
            the paper's Figure 2; else the batch is the configuration's.

    Raises:
        InputError: If the batch does not divide over a number of ranks, or the model does not fit the data.
    """
    batches = batches_on(config, ranks, grow_batch)
    simulation = Simulation(config, profile)
    points = [simulation.predict(number, batches[number]) for number in sorted(batches)]
    speeds = [point.batch / point.seconds / point.num_ranks for point in points]
    efficiencies = [speed / max(speeds) for speed in speeds]
    peak = efficiencies.index(1.0)  # up to which a rank is faster the more there are, since they share stages 4 and 5
    capacity = profile.memory.gibibytes * 2**30
    fits = [point.memory_bytes <= capacity for point in points]
    late = next((number for number in range(peak, len(points)) if efficiencies[number] < PAYS_FROM), None)
    best = max((n for n in range(len(points)) if fits[n] and (late is None or n < late)), default=None)
    fastest = min((n for n in range(len(points)) if fits[n]), key=lambda n: points[n].hours, default=None)
    chosen = points[best if best is not None else 0].num_ranks
    intervals = _intervals(simulation, chosen, batches[chosen])
    slot_sizes = _slot_sizes(simulation, chosen, batches[chosen])
    fitting = [size for size, point in slot_sizes.items() if point.memory_bytes <= capacity]
    return Plan(
        points=points,
        efficiencies=efficiencies,
        fits=fits,
        nodes=[Fabric(profile, point.num_ranks).num_nodes for point in points],
        best=best,
        fastest=fastest,
        stops_paying=None if late is None else points[late].num_ranks,
        intervals=intervals,
        best_interval=next((n for n, s in intervals.items() if s <= _CLOSE * min(intervals.values())), None),
        slot_sizes=slot_sizes,
        best_slot_size=min(fitting, key=lambda size: slot_sizes[size].seconds, default=None),
    )


def batches_on(config: Config, ranks: Sequence[int] | None, grow_batch: bool) -> dict[int, BatchConfig]:
    """The batch on each number of ranks; arguments and errors are those of `make_plan`."""
    batches = {number: _batch(config, number, grow_batch) for number in ranks or _possible(config, grow_batch)}
    for number, batch in batches.items():
        _check_divides(config, batch, number)
    return batches


def _batch(config: Config, num_ranks: int, grow: bool) -> BatchConfig:
    size = config.batch.per_rank * num_ranks
    return config.batch.model_copy(update={"global_size": size}) if grow else config.batch


def _possible(config: Config, grow: bool) -> list[int]:
    powers = [2**exponent for exponent in range(MOST_RANKS.bit_length())]
    slots = config.batch.global_size // config.batch.per_rank
    return [number for number in powers if grow or slots % number == 0]


def _check_divides(config: Config, batch: BatchConfig, num_ranks: int) -> None:
    try:
        batch_slots(config.model_copy(update={"batch": batch}), num_ranks)
    except InputError as error:
        raise InputError(f"--ranks {num_ranks}: {error}; or let the batch grow with the ranks: --grow-batch") from None


def _intervals(simulation: Simulation, num_ranks: int, batch: BatchConfig) -> dict[int, float]:
    if simulation.config.kfac is None:
        return {}
    shares = {number: simulation.shares(EveryRefresh(schedule="every", interval=number)) for number in INTERVALS}
    return {number: simulation.predict(num_ranks, batch, of_number).seconds for number, of_number in shares.items()}


def _slot_sizes(simulation: Simulation, num_ranks: int, batch: BatchConfig) -> dict[int, Prediction]:
    """Predictions for smaller and larger slots that the rank's images can be cut into."""
    images = batch.global_size // num_ranks
    sizes = [int(batch.per_rank * factor) for factor in _SLOT_FACTORS]
    return {
        size: simulation.predict(num_ranks, batch.model_copy(update={"per_rank": size}))
        for size in sizes
        if size >= 2 and images % size == 0
    }

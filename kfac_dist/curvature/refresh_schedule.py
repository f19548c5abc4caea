"""When to refresh which matrix of the Fisher: fixed intervals, the paper's Eq. 20 and 21, and an adaptive rule.

A schedule sees iterations and Diff values that are the same on every rank, so every rank decides alike.

    Diff(t) = ‖X(t) − X(t−1)‖_F / ‖X(t−1)‖_F    relative change of a matrix from one refresh to the next (Eq. 19)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kfac_dist.curvature.blocks.base import FactorKey


def eq20_interval(epoch: float) -> int:
    """min(20, 5·⌊e/5⌋ + 1) iterations in epoch e (Eq. 20)."""
    return min(20, 5 * (int(epoch) // 5) + 1)


def eq21_interval(epoch: float) -> int:
    """1 iteration before epoch 13, 20 from then on (Eq. 21)."""
    return 1 if epoch < 13 else 20


class RefreshSchedule(ABC):
    """Decides which factors each iteration refreshes."""

    needs_changes: bool = False
    """Whether `record` needs Diff values, which costs a pass over each refreshed matrix."""

    def plan_for(self, costs: Mapping[FactorKey, float]) -> None:
        """Learn the work of refreshing each factor; called before anything else, and again when layers come or go."""
        del costs  # only a schedule that spreads the load uses them

    @abstractmethod
    def due(self, keys: Sequence[FactorKey], iteration: int) -> list[FactorKey]:
        """Those of all factors that this iteration refreshes, in the order given; changes nothing."""

    @abstractmethod
    def record(self, iteration: int, changes: Mapping[FactorKey, float]) -> None:
        """Note that these factors were refreshed.

        Args:
            iteration: The iteration that refreshed them.
            changes: Diff of each; infinite where it is not known, as at a first refresh.
        """

    def forget(self, keys: Sequence[FactorKey]) -> None:
        """Make factors due of whose earlier refreshes nothing is left."""
        del keys  # a schedule that keeps nothing by factor has nothing to forget

    @abstractmethod
    def expected_interval(self, key: FactorKey, iteration: int) -> int:
        """Iterations that the inverse of a factor refreshed in this iteration will probably serve."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class IntervalRefresh(RefreshSchedule):
    """All layers together, at an interval that depends on the iteration only."""

    def __init__(self, interval_at: Callable[[int], int], interval_multiplier: Mapping[str, int] | None = None) -> None:
        """Set the intervals.

        Args:
            interval_at: Interval, ≥ 1, that holds at an iteration.
            interval_multiplier: Factor on the interval by the matrix's name; A may be refreshed less often than G, say.

        Raises:
            TypeError: If `interval_at` cannot be called.
        """
        if not callable(interval_at):
            raise TypeError(
                f"interval_at must be a function of the iteration, got {interval_at!r}: for an interval of 2 give "
                "lambda iteration: 2"
            )
        self._interval_at = interval_at
        self._interval_multiplier = dict(interval_multiplier or {})
        self._last: dict[FactorKey, int] = {}

    def due(self, keys: Sequence[FactorKey], iteration: int) -> list[FactorKey]:
        return [key for key in keys if self._is_due(key, iteration)]

    def record(self, iteration: int, changes: Mapping[FactorKey, float]) -> None:
        self._last |= dict.fromkeys(changes, iteration)

    def forget(self, keys: Sequence[FactorKey]) -> None:
        for key in keys:
            self._last.pop(key, None)

    def expected_interval(self, key: FactorKey, iteration: int) -> int:
        return self._interval(key[1], iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = dict(state["last"])

    def _is_due(self, key: FactorKey, iteration: int) -> bool:
        return key not in self._last or iteration - self._last[key] >= self._interval(key[1], iteration)

    def _interval(self, matrix: str, iteration: int) -> int:
        return self._interval_at(iteration) * self._interval_multiplier.get(matrix, 1)


class AdaptiveRefresh(RefreshSchedule):
    """Each matrix at its own interval, which grows while Diff stays small (after SP-NGD, Osawa et al. 2020).

    At a refresh with Diff ≤ threshold the next interval is the sum of the last two, at most `max_interval`; with a
    larger Diff it is half the last one, rounded down, at least 1. Up to `after_iteration` every interval is 1.

    The next refresh may be taken up to a quarter of the interval early, in the iteration of that window that has the
    least work planned, so that refreshes do not all fall into the same iteration.
    """

    def __init__(
        self,
        threshold: float,
        max_interval: int,
        after_iteration: int = 0,
    ) -> None:
        """Set the rule.

        Args:
            threshold: Largest Diff that lets an interval grow, > 0.
            max_interval: Longest interval in iterations, ≥ 1.
            after_iteration: Iteration up to which everything is refreshed every time.
        """
        self._threshold = threshold
        self._max_interval = max_interval
        self._after_iteration = after_iteration
        self._costs: dict[FactorKey, float] = {}
        self._intervals: dict[FactorKey, tuple[int, int]] = {}  # (last, the one before)
        self._next: dict[FactorKey, int] = {}
        self._load: dict[int, float] = {}

    needs_changes = True

    def plan_for(self, costs: Mapping[FactorKey, float]) -> None:
        self._costs = dict(costs)

    def due(self, keys: Sequence[FactorKey], iteration: int) -> list[FactorKey]:
        return [key for key in keys if self._next.get(key, iteration) <= iteration]

    def record(self, iteration: int, changes: Mapping[FactorKey, float]) -> None:
        self._load = {planned: load for planned, load in self._load.items() if planned > iteration}
        for key, change in changes.items():
            interval = self._grown_or_shrunk(key, change) if iteration >= self._after_iteration else 1
            self._intervals[key] = interval, self._intervals.get(key, (1, 0))[0]
            window = range(iteration + interval, iteration + interval - interval // 4 - 1, -1)
            self._next[key] = min(window, key=lambda planned: self._load.get(planned, 0.0))  # the latest of equals
            chosen = self._next[key]
            self._load[chosen] = self._load.get(chosen, 0.0) + self._costs.get(key, 1.0)

    def forget(self, keys: Sequence[FactorKey]) -> None:
        for key in keys:
            self._intervals.pop(key, None)
            self._next.pop(key, None)

    def expected_interval(self, key: FactorKey, iteration: int) -> int:
        return self._intervals.get(key, (1, 0))[0]

    def state_dict(self) -> dict[str, Any]:
        return {"intervals": dict(self._intervals), "next": dict(self._next), "load": dict(self._load)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._intervals = dict(state["intervals"])
        self._next = dict(state["next"])
        self._load = dict(state["load"])

    def _grown_or_shrunk(self, key: FactorKey, change: float) -> int:
        last, before = self._intervals.get(key, (1, 0))
        if change <= self._threshold:
            return min(self._max_interval, last + before)
        return max(1, last // 2)

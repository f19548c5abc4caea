"""What a run does about losses that are not finite: skip the update, and after several go back to a checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from kfac_dist.training.divergence import REMEDY

_DAMPING_FACTOR = 10.0


class Recovery:
    """Counts updates that every rank skipped because the loss was not finite on one.

    Attributes:
        num_nonfinite: Such updates so far.
        in_a_row: Those since the last update that was made.
        num_restores: How often the run went back to a checkpoint.
        damping_factor: What the configured damping is multiplied with since.
    """

    def __init__(self, max_in_a_row: int, max_restores: int) -> None:
        """Set the limits, of which the first is > 0."""
        self.num_nonfinite = self.in_a_row = self.num_restores = 0
        self.damping_factor = 1.0
        self._max_in_a_row, self._max_restores = max_in_a_row, max_restores
        self._last = ""

    def see(self, loss: float, iteration: int, epoch: float) -> bool:
        """Take in an iteration's mean loss, which is the same on every rank; whether the update was skipped for it."""
        if math.isfinite(loss):
            self.in_a_row = 0
            return False
        self.num_nonfinite += 1
        self.in_a_row += 1
        self._last = f"the training loss is {loss} at iteration {iteration} (epoch {epoch:.2f})"
        return True

    @property
    def wants_restore(self) -> bool:
        """Whether skipping has not helped."""
        return self.in_a_row >= self._max_in_a_row

    @property
    def is_exhausted(self) -> bool:
        """Whether going back has not helped, either."""
        return self.num_restores >= self._max_restores

    def restored(self) -> None:
        """The run is at its last checkpoint again: try with more damping."""
        self.num_restores += 1
        self.in_a_row = 0
        self.damping_factor *= _DAMPING_FACTOR

    def describe(self) -> str:
        """What happened, and what the user can do, for the message that ends the run."""
        times = {0: "no restart from a checkpoint", 1: "one restart from a checkpoint with more damping"}
        tried = times.get(self.num_restores, f"{self.num_restores} restarts from a checkpoint with more damping")
        return f"{self._last}: training diverged, {self.in_a_row} updates in a row, after {tried}. {REMEDY}"

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {
            "num_nonfinite": self.num_nonfinite,
            "in_a_row": self.in_a_row,
            "num_restores": self.num_restores,
            "damping_factor": self.damping_factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.num_nonfinite, self.in_a_row = int(state["num_nonfinite"]), int(state["in_a_row"])
        self.num_restores, self.damping_factor = int(state["num_restores"]), float(state["damping_factor"])

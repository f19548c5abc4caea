"""Whether training has diverged to a hopeless loss; `recovery` has what happens where it is no longer finite."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from kfac_dist.errors import TrainingDiverged

_HOPELESS = 3.0
REMEDY = "Lower optimizer.learning_rate, raise the damping, or keep a running average (kfac.ema_decay)"


class DivergenceCheck:
    """Looks at each iteration's mean loss, which is the same on every rank.

    A network that guesses has a loss of ln(classes), and so has one whose training fails mildly. One whose last epoch
    is worse than three times that, and than three times the first iteration, has learned nothing and lost what its
    initial weights knew.

    Args:
        num_classes: > 0.
        per_epoch: Iterations of an epoch, > 0.
    """

    def __init__(self, num_classes: int, per_epoch: int) -> None:
        self._guess = math.log(num_classes)
        self._first: float | None = None
        self._recent: deque[float] = deque(maxlen=per_epoch)

    def see(self, loss: float, iteration: int, epoch: float, gave_up: bool) -> None:
        """Take in an iteration's loss.

        Args:
            loss: Mean over the global batch.
            iteration: Its number, for the message.
            epoch: Where it ends, likewise.
            gave_up: Whether fp16 overflows even without a loss scale.

        Raises:
            TrainingDiverged: If training cannot go on.
        """
        if gave_up:
            place = f"iteration {iteration} (epoch {epoch:.2f}; it overflows fp16 even without a loss scale)"
            raise TrainingDiverged(f"the training loss is {loss} at {place}: training diverged. {REMEDY}")
        if math.isfinite(loss):
            self._first = loss if self._first is None else self._first
            self._recent.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {"first": self._first, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._first = state["first"]
        self._recent.clear()
        self._recent.extend(state["recent"])

    def check_end(self) -> None:
        """Judge the last epoch.

        Raises:
            TrainingDiverged: If its mean loss is hopeless.
        """
        if self._first is None:
            return
        mean = sum(self._recent) / len(self._recent)
        if mean > _HOPELESS * max(self._guess, self._first):
            raise TrainingDiverged(
                f"the mean training loss of the last epoch is {mean:.4g}, where guessing gives {self._guess:.4g} and "
                f"the first iteration gave {self._first:.4g}: training diverged. {REMEDY}"
            )

"""Dynamic loss scaling for fp16: gradients too small for half precision are kept by multiplying the loss.

The scale is a power of two, so scaling and unscaling by it are exact. An update whose gradients overflow on any rank is
skipped on every rank, and the scale is halved.

A rank that takes the mean of several losses in an update divides each by their number, and with another number of ranks
there would be another number of them. So that this does not change what overflows, the scaler multiplies by it again.
"""

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_dist.communicator import Communicator

_LARGEST_SCALE = 2.0**24  # beyond it nothing more of fp16's range is to be gained


class LossScaler:
    """Finds the loss scale; give it to the optimizer, which then unscales and skips by itself.

        scaler.scale_loss(loss).backward()
        optimizer.step()

    Takes the place of `torch.amp.GradScaler`, whose decision is each rank's own. It serves one optimizer: the first
    one's step sets a new scale, with which a second would unscale gradients of the old one.

    Attributes:
        scale: What the loss of one micro-batch is multiplied with now; the same on every rank.
        num_overflows: Updates skipped so far.
        is_exhausted: Whether gradients overflowed at a scale of 1, so that no scale can help: training diverged.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000, num_losses: int = 1) -> None:
        """Set the rule.

        Args:
            scale: First scale, a power of two from 1 to 2^24.
            growth_interval: Updates without overflow after which the scale is doubled, >= 1.
            num_losses: Losses of an update on one rank, >= 1, each of which was divided by that number. The same on
                every rank: leave it out where ranks take different numbers.

        Raises:
            ValueError: If a setting is out of range.
        """
        if scale not in {2.0**exponent for exponent in range(25)}:
            raise ValueError(f"scale must be a power of two from 1 to 2^24, got {scale}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be >= 1, got {growth_interval}")
        if num_losses < 1:
            raise ValueError(f"num_losses must be >= 1, got {num_losses}")
        self.scale = float(scale)
        self.num_overflows = 0
        self.is_exhausted = False
        self._growth_interval = growth_interval
        self._num_losses = num_losses
        self._num_good = 0
        self._optimizer: weakref.ref[Any] | None = None

    def serve(self, optimizer: object) -> None:
        """Note which optimizer unscales by this; called by its constructor.

        Raises:
            ValueError: If another one that still lives does.
        """
        if self._optimizer is not None and self._optimizer() is not None:
            gc.collect()  # what its user has let go of may be part of a cycle
        if self._optimizer is not None and self._optimizer() is not None:
            raise ValueError(
                "loss_scaler serves another optimizer already, whose step changes the scale before this one unscales: "
                "make a LossScaler for each and scale each optimizer's loss with its own, or give all parameters to "
                "one optimizer (groups). close() the other, or delete it, if this one takes its place"
            )
        self._optimizer = weakref.ref(optimizer)

    def release(self) -> None:
        """Forget the optimizer: it is closed."""
        self._optimizer = None

    @property
    def factor(self) -> float:
        """What `scale_loss` multiplies with, and the optimizer divides by: the scale times `num_losses`."""
        return self.scale * self._num_losses

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times `factor`."""
        return loss * self.factor

    def overflowed(self, buffers: Sequence[Tensor], communicator: Communicator) -> bool:
        """Whether any value on any rank is infinite or NaN; collective. Sets the scale for the next update.

        The only host synchronisation of a step in fp16.

        Args:
            buffers: This rank's gradients and factors before they are reduced; not all empty.
            communicator: Collectives over the ranks.
        """
        largest = [torch.linalg.vector_norm(buffer, ord=float("inf")) for buffer in buffers if buffer.numel()]
        flag = torch.stack(largest).isfinite().all().logical_not().float()
        found = bool(communicator.all_reduce_(flag, "max"))
        self._adjust(found)
        return found

    def _adjust(self, overflowed: bool) -> None:
        if overflowed:
            self.num_overflows += 1
            self._num_good = 0
            self.is_exhausted = self.scale == 1.0
            self.scale = max(1.0, self.scale / 2)
            return
        self.is_exhausted = False
        self._num_good += 1
        if self._num_good >= self._growth_interval:  # a loaded state may have counted further
            self._num_good = 0
            self.scale = min(_LARGEST_SCALE, self.scale * 2)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {"scale": self.scale, "num_good": self._num_good, "num_overflows": self.num_overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.scale = float(state["scale"])
        self._num_good = int(state["num_good"])
        self.num_overflows = int(state["num_overflows"])
        self.is_exhausted = False

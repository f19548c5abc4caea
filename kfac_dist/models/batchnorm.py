"""BatchNorm running statistics that do not depend on how a global batch is spread over ranks.

A rank works through its k slots one by one, and each forward pass would move the running statistics by the
layer's momentum m. Here the k passes of an iteration together move them once, towards the mean over the
slots:

    r <- (1 - m) r + m (b_0 + ... + b_{k-1}) / k,    b_j the batch statistics of slot j.

The result is linear in the b_j, so averaging it over ranks with equally many slots is the same as one rank
doing all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kfac_dist.errors import InputError
from kfac_dist.tensors.foreach import copy_all_


class SlotwiseBatchNorm:
    """Sets the momentum of a model's BatchNorm layers slot by slot.

    Each layer must be called once in a forward pass. `num_batches_tracked` counts this rank's slots and has
    no effect.

    Args:
        model: Layers without running statistics are left alone.

    Raises:
        InputError: If a layer keeps a cumulative average (momentum None), which has no fixed weight an
            iteration.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, float]] = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                continue
            if not module.track_running_stats:
                continue
            if module.momentum is None:
                raise InputError(f"BatchNorm layer {name}: momentum must be a number, got None: set it, such as to 0.1")
            self._layers.append((module, module.momentum))

    def before_slot(self, slot_index: int, num_slots: int) -> None:
        """Set the momentum for one forward pass in training mode.

        With a_j = (m / k) / (1 - (k - 1 - j) m / k), the passes that follow slot j shrink its weight a_j to m
        / k.

        Args:
            slot_index: j, place among this rank's slots of the iteration, in [0, num_slots).
            num_slots: k, slots of this rank in an iteration.
        """
        slots_to_come = num_slots - 1 - slot_index
        for module, momentum in self._layers:
            share = momentum / num_slots
            module.momentum = share / (1.0 - slots_to_come * share)

    def copy_of_running_buffers(self) -> list[Tensor]:
        """What `restore` goes back to."""
        return [buffer.clone() for buffer in self.running_buffers()]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Put the running statistics back to what they were."""
        copy_all_(self.running_buffers(), copies)

    def running_buffers(self) -> list[Tensor]:
        """Running means and variances, to be averaged in place over ranks before they are used."""
        return [
            buffer
            for module, _ in self._layers
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

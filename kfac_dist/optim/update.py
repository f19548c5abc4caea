"""The parameter update of Algorithm 1's last stage: Eq. 17 and Eq. 18.

The velocity is w(t) − w(t−1), the difference of the weights as they were after rescaling.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kfac_dist.vocabulary import WeightRescaling


def momentum_update_(
    weights: list[Tensor],
    directions: list[Tensor],
    velocities: list[Tensor],
    learning_rate: float,
    momentum: float,
) -> None:
    """Apply w(t+1) = w(t) − η 𝒢(t) + m (w(t) − w(t−1)) (Eq. 17), in place.

    Args:
        weights: w(t); become w(t+1).
        directions: 𝒢(t), same shapes.
        velocities: w(t) − w(t−1); become w(t+1) − w(t).
        learning_rate: η.
        momentum: m.
    """
    if not weights:
        return
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_add_(velocities, directions, alpha=-learning_rate)
    torch._foreach_add_(weights, velocities)


def rescale_weights_(weights: list[Tensor], mode: WeightRescaling, velocities: Sequence[Tensor] | None = None) -> None:
    """Rescale w ← √(2·d_out)·w / (‖w‖ + 1e-9) (Eq. 18), in place.

    Args:
        weights: Weights of Linear and convolution layers, (d_out, …).
        mode: "always" as printed in the paper; "cap" only where the norm exceeds the target; "off".
        velocities: w − (previous w) of each, changed to match the rescaled weights; None if there are none.
    """
    if mode == "off" or not weights:
        return
    scales = torch._foreach_norm(weights)
    torch._foreach_add_(scales, 1e-9)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [(2 * weight.shape[0]) ** 0.5 for weight in weights])
    if mode == "cap":
        torch._foreach_clamp_max_(scales, 1.0)
    if velocities is not None:  # s·w − (w − v) = v + (s − 1)·w
        for weight, velocity, offset in zip(weights, velocities, torch._foreach_sub(scales, 1.0), strict=True):
            velocity.addcmul_(weight, offset)
    torch._foreach_mul_(weights, list(scales))


def rescaled_weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that Eq. 18 applies to: those of Linear and convolution layers, not biases or BatchNorm."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and id(module.weight) not in seen:
            seen.add(id(module.weight))  # layers may share it
            yield module.weight

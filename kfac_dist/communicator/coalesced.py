"""Many small tensors in one collective: each of its own would cost the network's latency."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_dist.communicator.base import Communicator


def mean_over_ranks(communicator: Communicator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Means of tensors over all ranks; one collective for each precision among them.

    Args:
        communicator: Of the ranks, each of which gives tensors of the same shapes and precisions.
        tensors: On the communicator's device; left as they are.

    Returns:
        New tensors of the same shapes, in the same order.
    """
    means: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = communicator.all_reduce_(torch.cat([tensors[index].flatten() for index in indices]), "mean")
        parts = flat.split([tensors[index].numel() for index in indices])
        means |= {index: part.view_as(tensors[index]) for index, part in zip(indices, parts, strict=True)}
    return [means[index] for index in range(len(tensors))]

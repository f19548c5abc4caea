"""Operations on many tensors in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all_(destinations: Sequence[Tensor], sources: Sequence[Tensor | None]) -> None:
    """Copy tensor by tensor, zeros for None, in few launches.

    A foreach copy falls back to one launch a tensor for all of them if a single pair differs in its order in memory or
    its type (channels-last weights, half precision), so those are copied apart.
    """
    alike: tuple[list[Tensor], list[Tensor]] = ([], [])
    for destination, source in zip(destinations, sources, strict=True):
        if source is None:
            destination.zero_()
        elif source.dtype == destination.dtype and have_one_order(source, destination):
            alike[0].append(destination)
            alike[1].append(source)
        else:
            destination.copy_(source)
    if alike[0]:
        torch._foreach_copy_(*alike)


def have_one_order(one: Tensor, other: Tensor) -> bool:
    """Whether foreach operations take two tensors of one shape together: their values lie in memory in the same order.

    A dimension of size 1 may have any stride: a channels-last weight of a 1×1 convolution lies as an ordinary one does.
    """
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == others for size, stride, others in pairs)


def in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy, so that foreach operations take it and another one of its shape together."""
    return tensor if have_one_order(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

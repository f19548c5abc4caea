"""Operations on many tensors in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all_(destinations: Sequence[Tensor], sources: Sequence[Tensor | None]) -> None:
    """Copy tensor by tensor, zeros for None, in few launches.

    A foreach copy falls back to one launch a tensor for all of them if a single pair differs in its layout or type
    (channels-last weights, half precision), so those are copied apart.
    """
    alike: tuple[list[Tensor], list[Tensor]] = ([], [])
    for destination, source in zip(destinations, sources, strict=True):
        if source is None:
            destination.zero_()
        elif source.dtype == destination.dtype and have_one_order(source, destination):
            alike[0].append(destination)
            alike[1].append(in_layout_of(destination, source))
        else:
            destination.copy_(source)
    if alike[0]:
        torch._foreach_copy_(*alike)


def have_one_order(one: Tensor, other: Tensor) -> bool:
    """Whether the values of two tensors of one shape lie in memory in the same order, with the same gaps."""
    if one.stride() == other.stride():
        return True
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == others for size, stride, others in pairs)


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of another one of its shape, which foreach operations want; copied if it must be.

    A dimension of size 1 may have any stride: a channels-last weight of a 1×1 convolution lies as an ordinary one does.
    """
    if tensor.stride() == like.stride():
        return tensor
    if have_one_order(tensor, like):
        return tensor.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

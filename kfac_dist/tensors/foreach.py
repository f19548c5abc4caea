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
        elif source.dtype == destination.dtype and source.stride() == destination.stride():
            alike[0].append(destination)
            alike[1].append(source)
        else:
            destination.copy_(source)
    if alike[0]:
        torch._foreach_copy_(*alike)

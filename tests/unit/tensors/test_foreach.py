"""What is copied and updated together, in few launches."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist.tensors.foreach import copy_all_, have_one_order, in_order_of


class Operations(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def weight(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


# A channels-last weight of a 1×1 convolution says other strides than a slice of a flat buffer, and lies as it does.
CASES = [((6, 4, 1, 1), True), ((6, 1, 3, 3), True), ((6, 4, 3, 3), False), ((1, 1, 1, 1), True), ((0, 4, 3, 3), False)]


@pytest.mark.parametrize(("shape", "alike"), CASES)
def test_one_order(shape: tuple[int, ...], alike: bool) -> None:
    like, flat = weight(*shape), torch.randn(shape)
    assert have_one_order(like, flat) == alike
    ordered = in_order_of(like, flat)
    assert torch.equal(ordered, flat)
    assert have_one_order(ordered, like)
    assert (ordered.data_ptr() == flat.data_ptr()) == (alike or not flat.numel())


def test_only_what_lies_otherwise_is_copied_by_itself() -> None:
    sources = [weight(6, 4, 1, 1), weight(6, 4, 3, 3), torch.randn(5), None, torch.randn(3, dtype=torch.float64)]
    destinations = [
        torch.full((6, 4, 1, 1), 7.0),
        torch.full((6, 4, 3, 3), 7.0),
        *(torch.full((n,), 7.0) for n in (5, 2, 3)),
    ]
    with Operations() as operations:
        copy_all_(destinations, sources)
    assert operations.counts == {"_foreach_copy_": 1, "copy_": 2, "zero_": 1}
    for destination, source in zip(destinations, sources, strict=True):
        expected = torch.zeros_like(destination) if source is None else source.to(destination.dtype)
        assert torch.equal(destination, expected)

"""Small tensors share a collective and come back in their own shapes."""

import torch
from torch import Tensor

from kfac_dist.communicator.base import ReduceOp
from kfac_dist.communicator.coalesced import mean_over_ranks
from kfac_dist.communicator.local import LocalCommunicator


class Doubling(LocalCommunicator):
    """Stands for ranks whose mean is twice what this one has; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, torch.dtype]] = []

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        assert op == "mean"
        self.calls.append((tensor.numel(), tensor.dtype))
        return tensor.mul_(2)


def test_one_collective_a_precision_and_each_in_its_shape() -> None:
    single = [torch.arange(3.0), torch.tensor(7.0), torch.arange(6.0).view(2, 3).T]
    double = [torch.ones(2, dtype=torch.float64)]
    given = [single[0], double[0], single[1], single[2]]
    before = [tensor.clone() for tensor in given]
    communicator = Doubling()
    means = mean_over_ranks(communicator, given)
    assert communicator.calls == [(10, torch.float32), (2, torch.float64)]
    for tensor, old, mean in zip(given, before, means, strict=True):
        assert torch.equal(tensor, old)
        assert torch.equal(mean, 2 * old)
        assert mean.dtype == old.dtype


def test_nothing_is_sent_of_nothing() -> None:
    communicator = Doubling()
    assert mean_over_ranks(communicator, []) == []
    assert communicator.calls == []

"""What steps do again and again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.curvature import precondition
from kfac_dist.models import create_model
from kfac_dist.optim.kfac import KFAC
from tests.unit.allocated_bytes import AllocatedBytes

SHAPE = (3, 8, 8)


def test_a_step_without_a_refresh_takes_no_memory_of_the_size_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, products and updates lie in memory that is kept; only a layer with a bias joins both in new memory."""
    monkeypatch.setattr(precondition, "_KEPT_FROM", 0)  # most groups of so small a network are small
    net = create_model("resnet20", 10, SHAPE, seed=0)
    optimizer = KFAC(net, lr=1e-3, refresh=100, weight_rescaling="always")
    taken = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(2, *SHAPE)), torch.zeros(2, dtype=torch.int64)).backward()
        with AllocatedBytes() as allocated:
            optimizer.step()
        taken.append(allocated.total)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    assert taken[0] > weights, "the first step refreshes"
    assert max(taken[2:]) < 0.02 * weights


@pytest.mark.parametrize("refresh", [1, 12])  # Cholesky factors, and inverses; both lie together by size
def test_layers_that_are_frozen_one_by_one_keep_no_memory_but_their_own(refresh: int) -> None:
    net = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(6)], nn.Linear(40, 2, bias=False))
    optimizer = KFAC(net, lr=1e-3, refresh=refresh)
    for layer in net:
        for _ in range(refresh + 1):
            optimizer.zero_grad()
            net(torch.randn(50, 40)).square().mean().backward()
            optimizer.step()
        layer.requires_grad_(layer is net[-1])
    solvers = [solver.matrix for of in optimizer._fisher.owned._known.values() for solver in of.solvers.values()]
    assert len(solvers) == 14
    held = {matrix.untyped_storage().data_ptr(): matrix.untyped_storage().nbytes() for matrix in solvers}
    assert sum(held.values()) <= 1.2 * sum(matrix.nbytes for matrix in solvers)

"""A new layer type is a subclass of Block and a row of the table: two toy layers take part in training with that."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.create import BLOCK_TYPES, create_blocks
from kfac_dist.curvature.blocks.kronecker import KroneckerBlock
from kfac_dist.curvature.solvers import precondition_vectors
from tests.small_net import make_kfac
from tests.unit.curvature.layer_factors import random


class Scale(nn.Module):
    """Multiplies each feature of (N, features) with a number of its own."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        return x * self.weight


class ScaleBlock(Block):
    """The diagonal of the empirical Fisher, (1/N) Σ_n j_n² with j_n = N g x."""

    form = "diagonal"

    def __init__(self, name, module, parameters):
        super().__init__(name, module, parameters)
        self.factor_shapes = {"F": (self.num_values, 1)}

    def factor(self, matrix, x, g, num_samples=None):
        return (len(x) * g * x).square().mean(dim=0)[:, None, None]

    @staticmethod
    def shifts(mean_diagonals, damping):
        return {"F": damping}

    def arrange(self, gradient):
        return gradient.view(-1, 1, 1)

    def flatten(self, arranged):
        return arranged.flatten()

    @staticmethod
    def solve(arranged, solvers):
        return precondition_vectors(arranged, solvers["F"])


class Pointwise(nn.Module):
    """A linear layer at each position of (N, features, length)."""

    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.ones(num_outputs))

    def forward(self, x):
        return self.weight @ x + self.bias[:, None]


class PointwiseBlock(KroneckerBlock):
    """F ≈ G ⊗ A, as for a linear layer."""

    sample_dims = 2

    def feature_rows(self, values):
        return values.mT.reshape(1, -1, values.shape[1])


def test_without_a_row_the_layer_gets_the_plain_gradient():
    model = nn.Sequential(Scale(3))
    (block,) = create_blocks(model, list(model.parameters()), "diagonal")
    assert not block.is_preconditioned
    assert block.reason == "Scale has no K-FAC form here"


def test_a_subclass_of_block_and_a_row_train_a_new_layer_type(monkeypatch):
    monkeypatch.setitem(BLOCK_TYPES, Scale, ScaleBlock)
    model = nn.Sequential(nn.Linear(4, 3), Scale(3)).double()
    optimizer = make_kfac(model, lr=0.1, momentum=0.0, damping=0.01)
    assert [block.form for block in optimizer.blocks] == ["kronecker", "diagonal"]
    assert optimizer.uncovered == []
    for step in range(2):
        x, y = random(6, 4, seed=step), torch.tensor([0, 1, 2, 0, 1, 2])
        scale = model[1].weight
        by_sample = [torch.autograd.grad(F.cross_entropy(model(x[n, None]), y[n, None]), scale)[0] for n in range(6)]
        j = torch.stack(by_sample)
        expected = scale.detach() - 0.1 * j.mean(dim=0) / (j.square().mean(dim=0) + 0.01)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(scale.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_layer_of_rows_needs_only_say_what_they_are(decay, monkeypatch):
    monkeypatch.setitem(BLOCK_TYPES, Pointwise, PointwiseBlock)
    pointwise, linear = nn.Sequential(Pointwise(4, 3)).double(), nn.Sequential(nn.Linear(4, 3)).double()
    optimizers = [make_kfac(model, lr=0.1, ema_decay=decay) for model in (pointwise, linear)]
    for parameter, other in zip(pointwise.parameters(), linear.parameters(), strict=True):
        parameter.data = other.data = random(*parameter.shape)
    for step in range(3):
        x, target = random(6, 4, 5, seed=step), random(6, 3, 5, seed=step + 10)
        for optimizer, model, values in zip(optimizers, (pointwise, linear), (x, x.mT), strict=True):
            optimizer.zero_grad()
            output = model(values) if model is pointwise else model(values).mT
            F.mse_loss(output, target).backward()
            optimizer.step()
    for parameter, other in zip(pointwise.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-10, atol=1e-12)

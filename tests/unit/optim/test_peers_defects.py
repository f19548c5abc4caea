"""Defects found in other implementations of K-FAC, each made to show if it were here. One process, float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.communicator import MpiCommunicator, Pending
from kfac_dist.optim.kfac import KFAC
from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, running, train, weights


def test_damping_does_not_accumulate_in_the_running_average() -> None:
    """Defect: damping is added in place to the running Fisher, and so grows step by step."""
    fishers = []
    for damping in (1e-6, 100.0):
        net = make_net()
        optimizer = make_kfac(net, lr=0.0, ema_decay=0.5, damping=damping)
        train(net, optimizer, steps=3)
        fishers.append(running(optimizer))
    assert_equal(list(fishers[1].values()), list(fishers[0].values()))


class Counting(MpiCommunicator):
    def __init__(self) -> None:
        super().__init__("reduce")
        self.calls: list[str] = []

    def start_reduce_scatter_v(self, buffer: Tensor, counts: Any, *settings: Any) -> Pending[Tensor]:
        self.calls.append("reduce_scatter_v")
        return super().start_reduce_scatter_v(buffer, counts, *settings)

    def start_all_gather_v(self, buffer: Tensor, counts: Any, *settings: Any) -> Pending[None]:
        self.calls.append("all_gather_v")
        return super().start_all_gather_v(buffer, counts, *settings)


def test_accumulation_communicates_once_an_update() -> None:
    """Defect: with k accumulation steps, matrices and gradients travel k times."""
    net = make_net()
    communicator = Counting()
    optimizer = KFAC(net, communicator, accumulation_steps=4)
    calls_of_an_update = ["reduce_scatter_v", "reduce_scatter_v", "all_gather_v"]  # matrices, gradients, updates
    for update in range(2):
        for micro_batch in range(4):
            backward(net, step=micro_batch)
            assert communicator.calls == calls_of_an_update * update
        optimizer.step()
        optimizer.zero_grad()
    assert communicator.calls == calls_of_an_update * 2


@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
def test_the_fisher_does_not_scale_with_the_batch_size(form: str) -> None:
    """Defect: the gradients of the mean loss are not multiplied by the batch size, so G shrinks with its square."""
    fishers = []
    for copies in (1, 5):
        net = make_net()
        optimizer = make_kfac(net, batchnorm=form)
        x, y = make_batch()
        F.cross_entropy(net(x.repeat(copies, 1, 1, 1)), y.repeat(copies)).backward()
        optimizer.step()
        fishers.append(running(optimizer))
    assert set(fishers[0]) == {"0.A", "0.G", "1.F", "4.A", "4.G"}
    for name, matrix in fishers[0].items():
        torch.testing.assert_close(fishers[1][name], matrix, rtol=1e-11, atol=1e-13)
        assert matrix.norm() > 1e-3


def test_the_running_average_is_unbiased_from_the_first_step_on() -> None:
    """Defect: the running Fisher starts at the identity, so that the first steps are biased towards SGD."""
    results = []
    for decay in (None, 0.99):
        net = make_net()
        train(net, make_kfac(net, ema_decay=decay, damping=1e-3))
        results.append(weights(net))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2)},
        {"kernel_size": 3, "stride": (1, 2)},
        {"kernel_size": 3, "padding": (0, 2)},
        {"kernel_size": 2, "dilation": (2, 1)},
        {"kernel_size": (1, 3), "stride": (3, 1), "padding": (2, 1), "dilation": (1, 2)},
    ],
    ids=str,
)
def test_convolutions_that_are_not_square_get_their_own_factor(geometry: dict[str, Any]) -> None:
    """Defect: only the first number of stride, padding or dilation is used, or none, without a word."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, **geometry).double()
    optimizer = make_kfac(conv)
    x, _ = make_batch()
    conv(x).square().mean().backward()
    optimizer.step()
    patches = F.unfold(x, **geometry)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
    expected = torch.einsum("nit, njt -> ij", patches, patches) / len(x)
    torch.testing.assert_close(running(optimizer)["(root).A"][0], expected, rtol=1e-12, atol=1e-12)


class SplitConv(nn.Module):
    """A convolution of two groups, written as two convolutions."""

    def __init__(self, grouped: nn.Conv2d) -> None:
        super().__init__()
        halves = zip(grouped.weight.detach().chunk(2), grouped.bias.detach().chunk(2), strict=True)
        self.halves = nn.ModuleList(nn.Conv2d(2, 3, 3).double() for _ in range(2))
        for half, (weight, bias) in zip(self.halves, halves, strict=True):
            half.weight.data, half.bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, dim=1), strict=True)], dim=1)


def test_a_grouped_convolution_equals_a_convolution_for_each_group() -> None:
    """Defect: groups are ignored, and the factors are those of a dense convolution."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, groups=2).double()
    split = SplitConv(grouped)
    x = torch.randn(8, 4, 5, 5, dtype=torch.float64)
    for model in (grouped, split):
        optimizer = make_kfac(model, damping=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).tanh().square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(grouped.weight, torch.cat([h.weight for h in split.halves]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grouped.bias, torch.cat([h.bias for h in split.halves]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
def test_batchnorm_with_zero_scale(form: str) -> None:
    """Defect: the normalised input is found from the output divided by gamma, so gamma = 0 gives NaN or nothing."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2, dtype=torch.float64)
    nn.init.zeros_(norm.weight)
    optimizer = make_kfac(norm, batchnorm=form, damping=1e-4, batchnorm_damping_ratio=1.0, lr=1.0, momentum=0.0)
    x, _ = make_batch()
    pull = torch.randn_like(x)
    loss = (norm(x) * pull).sum() / len(x)  # the output's gradient is pull/N whatever gamma is
    loss.backward()
    optimizer.step()
    h = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    j = torch.cat([(pull * h).sum((2, 3)), pull.sum((2, 3))], dim=1)
    fisher = j.T @ j / len(x)
    channel = torch.arange(2).repeat(2)
    kept = {"full": torch.ones(4, 4), "unit": channel[:, None] == channel, "diagonal": torch.eye(4)}[form]
    damped = fisher * kept + 1e-4 * torch.eye(4, dtype=torch.float64)
    expected = -torch.linalg.solve(damped, j.mean(0))
    torch.testing.assert_close(torch.cat([norm.weight, norm.bias]).detach(), expected, rtol=1e-10, atol=1e-12)


class Activated(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.inner = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(75, 6)
        self.head = nn.Linear(6, 4)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv(x), inplace=self.inplace)
        x = F.relu(self.bn(self.inner(x)), inplace=self.inplace)
        y = self.fc(x.flatten(1))
        y = y.mul_(2.0) if self.inplace else y * 2.0
        return self.head(F.relu(y, inplace=self.inplace))


def test_in_place_activations_after_covered_layers() -> None:
    """Defect: a full backward hook fails on, or is confused by, an activation that overwrites the layer's output."""
    results = []
    for inplace in (False, True):
        model = Activated(inplace).double()
        optimizer = make_kfac(model, batchnorm="full", damping=1e-3)
        train(model, optimizer, steps=2)
        results.append([*weights(model), *running(optimizer).values()])
    for inplace_tensor, tensor in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(inplace_tensor, tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-3, 1e-8, 1e-14])
def test_small_damping_gives_no_nan(damping: float) -> None:
    """Defect: rank-deficient factors with little damping end in NaN weights (two samples; a dead activation)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    nn.init.constant_(net[0].bias, -100.0)  # the activation is dead: no gradient reaches the first layer
    optimizer = make_kfac(net, damping=damping, lr=1e-4, batchnorm="full")
    for seed in range(2):
        x = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.tensor([0, 3])).backward()
        optimizer.step()
    assert all(bool(weight.isfinite().all()) for weight in weights(net))

"""How KFAC treats layers that it does not cover, steps that must leave no trace, and unusual calls. Float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, running, train, weights

# Layers that are not covered -----------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.own = OwnLinear(6, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)
        self.covered = nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.table.weight
        self.skipped = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.own(self.norm(self.embedding(tokens)))
        return self.skipped(self.tied(self.covered(self.frozen(x)) + self.table(tokens)))


def test_uncovered_layers_are_listed_with_the_reason_and_get_the_plain_gradient() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = make_kfac(model, lr=0.25, momentum=0.0, skip=["skipped.*"])
    reasons = {block.name: block.reason for block in optimizer.uncovered}
    assert reasons == {
        "embedding": "Embedding has no K-FAC form here",
        "norm": "LayerNorm has no K-FAC form here",
        "own": "OwnLinear has no K-FAC form here",
        "frozen": "the weight is frozen or not given to the optimizer",
        "table": "Embedding has no K-FAC form here",
        "tied": "a parameter is shared with another layer",
        "skipped.0": "skipped by pattern",
        "skipped.1": "skipped by pattern",
    }
    assert [block.name for block in optimizer.blocks if block.factor_shapes] == ["covered"]

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.tensor([0, 3, 1, 4, 2, 2])
    F.cross_entropy(model(tokens), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name == "frozen.weight":
            assert torch.equal(parameter, before[name])
        elif name.startswith("covered"):
            assert not torch.allclose(parameter, before[name] - 0.25 * parameter.grad, rtol=0.05)
        else:
            assert torch.equal(parameter, before[name] - 0.25 * parameter.grad), name


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [(["0"], {"0"}), (["4"], {"4"}), (["[01]"], {"0", "1"}), (["*"], {"0", "1", "4"}), ([], set())],
)
def test_skip_patterns(patterns: list[str], skipped: set[str]) -> None:
    net = make_net()
    optimizer = make_kfac(net, skip=patterns, lr=0.25, momentum=0.0)
    assert {block.name for block in optimizer.uncovered} == skipped
    before = weights(net)
    train(net, optimizer)
    moved = {
        name.split(".")[0]: torch.equal(p.detach(), b - 0.25 * p.grad)
        for (name, p), b in zip(net.named_parameters(), before, strict=True)
    }
    assert moved == {name: name in skipped for name in ("0", "1", "4")}


# Steps that must leave no trace --------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("gradient", ["zero", "none"])
@pytest.mark.parametrize("optimizer_settings", [{}, {"weight_decay": 0.1, "weight_rescaling": "always"}])
def test_a_step_that_only_creates_state_changes_nothing_else(
    gradient: str, lr: float, optimizer_settings: dict[str, Any]
) -> None:
    net = make_net()
    settings = {"lr": 0.1, "ema_decay": 0.5, "refresh": 2, **optimizer_settings}
    optimizer = make_kfac(net, **settings)
    before = weights(net)
    if gradient == "zero":
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1
    assert_equal(weights(net), before)
    assert set(optimizer.state) == set(net.parameters())
    state = optimizer.state_dict()["kfac"]
    assert state["iteration"] == 0
    assert all(not block["running"] and not block["solvers"] for block in state["blocks"].values())

    fresh = make_net()
    train(fresh, make_kfac(fresh, **settings), steps=3)
    train(net, optimizer, steps=3)
    assert_equal(weights(net), weights(fresh))


def test_forwards_in_eval_mode_or_without_gradients_leave_no_trace() -> None:
    nets = [make_net(), make_net()]
    plain, probed = (make_kfac(net) for net in nets)
    probe = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for step in range(2):
        backward(nets[0], step)
        nets[1].eval()
        nets[1](probe)
        nets[1](probe).sum().backward()  # leaves gradients, which zero_grad takes away, but no factors
        assert not probed._fisher.capture.captured
        nets[1].train()
        nets[1][1].eval()  # no change of BatchNorm's running statistics by what follows
        with torch.no_grad():
            nets[1](probe)
        with torch.inference_mode():
            nets[1](probe)
        nets[1](probe)  # a forward without a backward
        assert not probed._fisher.capture.captured
        nets[1][1].train()
        for parameter in nets[1].parameters():
            parameter.grad = None
        backward(nets[1], step)
        for optimizer in (plain, probed):
            optimizer.step()
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None
    assert_equal(weights(nets[0]), weights(nets[1]))


def test_zero_grad_drops_captured_statistics() -> None:
    nets = [make_net(), make_net()]
    clean, disturbed = (make_kfac(net, batchnorm="full") for net in nets)
    nets[1][1].momentum = nets[0][1].momentum = 0.0
    backward(nets[1], step=5)
    assert disturbed._fisher.capture.captured == {"0", "1", "4"}
    disturbed.zero_grad()
    assert not disturbed._fisher.capture.captured
    for net, optimizer in zip(nets, (clean, disturbed), strict=True):
        backward(net, step=0)
        optimizer.step()
    assert_equal(weights(nets[0]), weights(nets[1]))


def test_a_batchnorm_layer_in_eval_mode_gets_the_plain_gradient_and_the_others_kfac() -> None:
    net = make_net()
    optimizer = make_kfac(net, lr=0.25, momentum=0.0, damping=1e-3)
    net[1].eval()
    before = weights(net)
    train(net, optimizer, steps=1)
    moved = [torch.equal(p.detach(), b - 0.25 * p.grad) for p, b in zip(net.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, False, False]


def test_a_step_in_eval_mode_takes_the_plain_gradient_and_the_fisher_stays_due() -> None:
    net = make_net()
    optimizer = make_kfac(net, lr=0.25, momentum=0.0, refresh=3)
    net.eval()
    before = weights(net)
    train(net, optimizer)
    assert_equal(weights(net), [b - 0.25 * p.grad for b, p in zip(before, net.parameters(), strict=True)])
    net.train()
    train(net, optimizer)
    assert set(running(optimizer)) == {"0.A", "0.G", "1.F", "4.A", "4.G"}


class WithUnused(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Linear(3, 3, dtype=torch.float64)
        self.unused_norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("refresh", [1, 2])  # 2: parts of the buffer move, and find old values
def test_an_unused_layer_stays_as_it_is_and_the_others_do_not_notice(refresh: int) -> None:
    settings = {"ema_decay": 0.5, "refresh": refresh}
    alone, model = make_net(), WithUnused(make_net())
    unused = weights(model.unused) + weights(model.unused_norm)
    train(alone, make_kfac(alone, **settings), steps=3)
    optimizer = make_kfac(model, **settings)
    for step in range(3):
        train(model, optimizer, steps=1, first=step)
        assert optimizer.report.retries == optimizer.report.kept_inverses == 0
    assert_equal(weights(model.net), weights(alone))
    assert_equal(weights(model.unused) + weights(model.unused_norm), unused)


# Layouts, shapes, ways to call a layer -------------------------------------------------------------------


def test_channels_last_model_input_and_gradients_change_nothing() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = make_net()
        net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1).double(), *net).to(memory_format=memory_format)
        with torch.no_grad():
            net[0].weight.copy_(torch.linspace(-0.5, 0.5, net[0].weight.numel(), dtype=torch.float64).view(2, 2, 3, 3))
            net[0].bias.zero_()
        optimizer = make_kfac(net, weight_decay=0.01, weight_rescaling="cap")
        assert net[0].weight.is_contiguous(memory_format=memory_format)
        for step in range(3):
            x, y = make_batch(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x.to(memory_format=memory_format)), y).backward()
            for parameter in net.parameters():
                if parameter.dim() == 4:
                    parameter.grad = parameter.grad.to(memory_format=memory_format)
            optimizer.step()
        results.append(weights(net))
    for contiguous, channels_last in zip(*results, strict=True):
        torch.testing.assert_close(channels_last, contiguous, rtol=1e-9, atol=1e-11)


class Twice(nn.Module):
    """One Linear layer for two halves of the input: in two calls, or in one call on two positions."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = calls
        self.shared = nn.Linear(5, 3)
        self.last = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.flatten(1).view(-1, 2, 25)[..., :5]
        both = (
            torch.stack([self.shared(half) for half in halves.unbind(1)], 1) if self.calls == 2 else self.shared(halves)
        )
        return self.last(both.tanh().sum(1))


def test_a_layer_used_twice_equals_one_use_on_all_positions() -> None:
    results = []
    for calls in (1, 2):
        model = Twice(calls).double()
        train(model, make_kfac(model, damping=1e-3), steps=2)
        results.append(weights(model))
    for once, twice in zip(*results, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-10, atol=1e-12)


def test_a_layer_may_be_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[4](input=self.net[:4](x))

    net, model = make_net(), ByKeyword(make_net())
    train(net, make_kfac(net), steps=2)
    train(model, make_kfac(model), steps=2)
    assert_equal(weights(model), weights(net))


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_sample_without_a_batch_dimension_is_a_batch_of_one(layer: str) -> None:
    results = []
    for batched in (True, False):
        torch.manual_seed(0)
        model = (nn.Linear(5, 4) if layer == "linear" else nn.Conv2d(2, 4, 5)).double()
        optimizer = make_kfac(model)
        x = make_batch()[0][0]
        x = x[0, 0] if layer == "linear" else x
        logits = model(x[None] if batched else x).flatten()
        F.cross_entropy(logits, torch.tensor(1)).backward()
        optimizer.step()
        results.append(weights(model))
    for batched_weight, weight in zip(*results, strict=True):
        torch.testing.assert_close(weight, batched_weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_sample_without_a_batch_dimension_counts_as_much_beside_a_batch(layer: str) -> None:
    """The last micro-batch of one image, squeezed. Defect: the positions of its gradients had another weight."""
    results = []
    for squeezed in (False, True):
        torch.manual_seed(0)
        model = (nn.Linear(5, 4) if layer == "linear" else nn.Conv2d(2, 4, 5)).double()
        optimizer = make_kfac(model)
        for part in make_batch()[0].split(7):
            x = part[:, 0, 0] if layer == "linear" else part
            x = x.squeeze(0) if squeezed else x
            (model(x).square().sum(-1).mean() / 2).backward()
        optimizer.step()
        results.append([*weights(model), *running(optimizer).values()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_a_pattern_that_fits_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip must hold patterns .* got 'head\*', which fits none"):
        make_kfac(make_net(), skip=["0", "head*"])

"""The baselines against torch's own classes and hand calculations: SGD with Nesterov momentum, AdamW, LARS, Muon."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import SGD, LossScaler, create_communicator
from kfac_dist.config.load import load_config
from kfac_dist.data.sampling import SlotSampler
from kfac_dist.optim.averaged import Averaging
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.baselines import LARS, AdamW, Muon
from kfac_dist.timing import StageTimer
from kfac_dist.training.build import Parts, create_optimizer
from kfac_dist.training.schedules import Schedules
from tests.paths import QUICKSTART
from tests.small_net import assert_equal, backward, make_net, train, weights

Make = Callable[..., DistributedOptimizer]

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "lars": (LARS, {"lr": 2.0, "momentum": 0.8, "weight_decay": 0.01, "trust_coefficient": 0.02}),
    "muon": (Muon, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "others_lr": 0.02, "newton_schulz_steps": 4}),
}


def make(name: str, net: nn.Module, **more: Any) -> Any:
    kind, settings = SETTINGS[name]
    return kind(net, create_communicator("reduce"), **settings, **more)


@pytest.mark.parametrize(("name", "reference"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_same_as_torch(name: str, reference: Any) -> None:
    net, other = make_net(), make_net()
    train(net, make(name, net), steps=5)
    train(other, reference(other.parameters(), **SETTINGS[name][1]), steps=5)
    assert_equal(weights(net), weights(other))
    assert max((a - b).abs().max() for a, b in zip(weights(net), weights(make_net()), strict=True)) > 1e-3


def test_lars_by_hand() -> None:
    net, other = make_net(), make_net()
    train(net, make("lars", net), steps=3)
    velocities = [torch.zeros_like(parameter) for parameter in other.parameters()]
    for step in range(3):
        other.zero_grad()
        backward(other, step)
        with torch.no_grad():
            for number, (w, v) in enumerate(zip(other.parameters(), velocities, strict=True)):
                assert w.grad is not None
                trust = 0.02 * w.norm() / (w.grad.norm() + 0.01 * w.norm()) if number in (0, 4) else 1.0
                v.mul_(0.8).add_(trust * (w.grad + 0.01 * w))
                w.sub_(2.0 * v)
    torch.testing.assert_close(weights(net), weights(other), rtol=1e-12, atol=1e-14)


def test_lars_where_a_norm_is_zero() -> None:
    net = make_net()
    optimizer = make("lars", net)
    with torch.no_grad():
        net[0].weight.zero_()
    optimizer.zero_grad()
    backward(net)
    gradient = net[0].weight.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), -2.0 * gradient)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_muon_is_torchs_for_matrices_and_sgd_for_the_rest() -> None:
    net, other = make_net(), make_net()
    train(net, make("muon", net), steps=4)
    convolution = nn.Parameter(other[0].weight.detach().view(3, 18).clone())
    matrices = torch.optim.Muon([convolution, other[4].weight], lr=0.05, momentum=0.8, weight_decay=0.1, ns_steps=4)
    rest = [other[0].bias, other[1].weight, other[1].bias, other[4].bias]
    sgd = torch.optim.SGD(rest, lr=0.02, momentum=0.8, weight_decay=0.1, nesterov=True)
    for step in range(4):
        other.zero_grad()
        backward(other, step)
        convolution.grad = other[0].weight.grad.view(3, 18)
        matrices.step()
        sgd.step()
        with torch.no_grad():
            other[0].weight.copy_(convolution.view_as(other[0].weight))
    assert_equal(weights(net), weights(other))
    assert (weights(net)[0] - make_net()[0].weight).norm() > 0.1


def test_muon_moves_by_orthogonal_matrices() -> None:
    """What the orthogonalisation is for: every singular value of the first update is about the learning rate."""
    net = make_net()
    before = net[0].weight.detach().clone()
    optimizer = Muon(net, create_communicator("reduce"), lr=0.05)
    train(net, optimizer)
    values = torch.linalg.svdvals(((net[0].weight.detach() - before) / 0.05).view(3, 18))
    assert 0.6 < values.min() < values.max() < 1.3


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loaded_run_continues_bit_for_bit(name: str) -> None:
    net = make_net()
    optimizer = make(name, net)
    train(net, optimizer, steps=3)
    saved = through_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, steps=3, first=3)
    other = make_net(seed=1)
    resumed = make(name, other)
    train(other, resumed, steps=2, first=50)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, steps=3, first=3)
    assert_equal(weights(other), weights(net))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_scale_is_undone_and_an_overflow_changes_nothing(name: str) -> None:
    def scaled(net: nn.Module, **more: Any) -> Any:
        if name == "sgd":
            return make(name, net, **more)
        return make(name, net, averaging=Averaging(**more))

    def step(net: nn.Module, optimizer: Any, scaler: LossScaler, factor: float) -> None:
        optimizer.zero_grad()
        x = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        loss: Tensor = net(x).square().mean() * factor
        scaler.scale_loss(loss).backward()
        optimizer.step()

    results = []
    for scale in (1.0, 1024.0):
        net, scaler = make_net(), LossScaler(scale)
        optimizer = scaled(net, loss_scaler=scaler, weight_rescaling="always")
        step(net, optimizer, scaler, 1.0)
        before = weights(net)
        step(net, optimizer, scaler, float("inf"))
        assert optimizer.report.skipped
        assert_equal(weights(net), before)
        results.append(before)
    assert_equal(*results)
    assert results[0][0].norm() == pytest.approx((2 * 3) ** 0.5)


def created(*overrides: str) -> Any:
    config = load_config(QUICKSTART, overrides)
    schedules = Schedules(config, SlotSampler(1438, 64, 2, seed=0))
    net = make_net()
    optimizer = create_optimizer(config, Parts(net, create_communicator("reduce"), 1, schedules, StageTimer()))
    return net, optimizer, schedules


def test_settings_reach_the_baselines() -> None:
    peak = "optimizer.learning_rate=0.2"
    _, sgd, _ = created(peak, "kfac=null", "optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0.8")
    assert isinstance(sgd, SGD)
    assert (sgd.param_groups[0]["nesterov"], sgd.param_groups[0]["momentum"]) == (True, 0.8)
    _, adamw, _ = created(peak, "kfac=null", "optimizer.name=adamw", "optimizer.beta2=0.9", "optimizer.epsilon=1e-3")
    assert isinstance(adamw, AdamW)
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["eps"]) == ((0.9, 0.9), 1e-3)
    _, lars, _ = created(
        peak, "kfac=null", "optimizer.name=lars", "optimizer.trust_coefficient=0.5", "optimizer.nesterov=true"
    )
    assert isinstance(lars, LARS)
    assert (lars._trust_coefficient, lars.param_groups[0]["nesterov"]) == (0.5, True)
    _, muon, schedules = created(
        peak,
        "kfac=null",
        "optimizer.name=muon",
        "optimizer.others_learning_rate=0.05",
        "optimizer.newton_schulz_steps=3",
    )
    assert isinstance(muon, Muon)
    assert [group["ns_steps"] for group in muon.param_groups] == [3, 3]
    schedules.settings(20).apply_to(muon.param_groups)
    rates = [group["lr"] for group in muon.param_groups]
    assert rates[1] == pytest.approx(rates[0] / 4)
    assert 0 < rates[0] < 0.2


@pytest.mark.parametrize("name", ["sgd", "kfac", "muon"])
def test_no_weight_decay_on_biases_and_batchnorm(name: str) -> None:
    overrides = [f"optimizer.name={name}", "optimizer.weight_decay=0.1"]
    if name != "kfac":
        overrides.append("kfac=null")
    for decayed, expected in (("all", {0.1}), ("weights", {0.0})):
        net, optimizer, _ = created(*overrides, f"optimizer.decayed={decayed}")
        by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        decays = [by_id[id(parameter)] for parameter in net.parameters()]
        assert (decays[0], decays[4]) == (0.1, 0.1)
        assert {decays[number] for number in (1, 2, 3, 5)} == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_hooks_of_a_step_are_called_once(name: str) -> None:
    for kind in (torch.optim.SGD, torch.optim.AdamW):  # their classes' steps call hooks from then on
        kind(make_net().parameters(), lr=0.1)
    net, calls = make_net(), list[str]()
    optimizer = make(name, net)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(net, optimizer, steps=1)
    assert calls == ["before", "after"]


def test_muon_takes_parameters_in_every_form_that_torch_does() -> None:
    results = []
    for params in (
        lambda net: None,
        lambda net: net.named_parameters(),
        lambda net: [{"params": list(net.named_parameters())}],
        lambda net: [{"params": parameter} for parameter in net.parameters()],
    ):
        net = make_net()
        train(net, make("muon", net, params=params(net)), steps=2)
        results.append(weights(net))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("name", ["lars", "muon"])
def test_a_layer_that_is_added_later_is_trained_as_if_it_had_been_there(name: str) -> None:
    results = []
    for is_late in (False, True):
        net, head = make_net(), nn.Linear(4, 4, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(torch.eye(4))
            head.bias.zero_()
        if is_late:
            optimizer = make(name, net, averaging=Averaging(weight_rescaling="always"))
            net.append(head)
            optimizer.add_param_group({"params": head.parameters()})
        else:
            net.append(head)
            optimizer = make(name, net, averaging=Averaging(weight_rescaling="always"))
        train(net, optimizer, steps=2)
        results.append(weights(net))
    assert_equal(*results)

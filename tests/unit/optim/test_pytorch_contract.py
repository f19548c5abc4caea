"""What PyTorch users expect of an optimizer: closures, schedulers, groups, refusals. One process, float64."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import kfac_dist
from kfac_dist import KFAC, SGD, create_communicator
from kfac_dist.optim.buffers import read_update
from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, train, weights

# Closures, schedulers, groups ----------------------------------------------------------------------------


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    net = make_net()
    optimizer = make_kfac(net, lr=0.1)
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(backward(net))
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert optimizer.step() is None
    assert len(losses) == 1

    other = make_net()
    ordinary = make_kfac(other, lr=0.1)
    train(other, ordinary)
    ordinary.step()
    assert_equal(weights(net), weights(other))


@pytest.mark.parametrize("passes", [1, 2])
def test_zero_grad_may_stand_between_forward_and_backward(passes: int) -> None:
    nets = [make_net(), make_net()]
    for late, net in zip((False, True), nets, strict=True):
        optimizer = make_kfac(net)
        for step in range(3):
            for part in range(passes):
                x, y = make_batch(2 * step + part)
                if part == 0 and not late:
                    optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y) / passes
                if part == 0 and late:
                    optimizer.zero_grad()
                loss.backward()
            assert optimizer._fisher.capture.num_passes == passes
            optimizer.step()
    assert_equal(weights(nets[0]), weights(nets[1]))


def test_one_cycle_schedule_sets_learning_rate_and_momentum() -> None:
    net = make_net()
    optimizer = make_kfac(net)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.95)
    seen = []
    for _ in range(10):
        before = weights(net)
        velocity = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()] if seen else None
        optimizer.zero_grad()
        backward(net)
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
        optimizer.step()
        if velocity:  # Δw = m·v − η·𝒢, so a step with these values moved the weights by them
            updates = optimizer._shared.buffers.updates()
            directions = [torch.cat([p.flatten() for p in read_update(updates, block)]) for block in optimizer.blocks]
            moved = torch.cat([(p - b).flatten() for p, b in zip(weights(net), before, strict=True)])
            expected = group["momentum"] * torch.cat([v.flatten() for v in velocity]) - group["lr"] * torch.cat(
                directions
            )
            torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
        if len(seen) < 10:
            scheduler.step()
    assert max(lr for lr, _ in seen) == pytest.approx(0.1)
    assert min(momentum for _, momentum in seen) == pytest.approx(0.8)


def test_lambda_schedule_equals_setting_the_learning_rate_by_hand() -> None:
    nets = [make_net(), make_net()]
    scheduled, by_hand = (make_kfac(net, lr=0.2) for net in nets)
    scheduler = LambdaLR(scheduled, lambda step: 1 / (1 + step))
    for step in range(3):
        by_hand.param_groups[0]["lr"] = 0.2 / (1 + step)
        for net, optimizer in zip(nets, (scheduled, by_hand), strict=True):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
        scheduler.step()
    assert_equal(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize(
    "own",
    [{"lr": 0.2}, {"momentum": 0.5}, {"damping": 0.5}, {"weight_decay": 0.3}, {"weight_rescaling": "always"}],
    ids=lambda own: next(iter(own)),
)
def test_a_group_follows_its_own_setting_and_leaves_the_others_theirs(own: dict[str, Any]) -> None:
    """Each layer must move as if the whole model had its group's settings; one step, so layers do not mix."""
    common = {"lr": 0.1, "momentum": 0.9, "damping": 0.03, "weight_decay": 0.0, "weight_rescaling": "off"}
    velocity = 0.01  # so that momentum shows in the first step

    def step(groups: Callable[[nn.Sequential], Any], **settings: Any) -> list[Tensor]:
        net = make_net()
        optimizer = make_kfac(net, params=groups(net), **settings)
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, velocity)
        train(net, optimizer)
        return weights(net)

    def split(net: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": [*net[0].parameters(), *net[1].parameters()]}, {"params": net[4].parameters(), **own}]

    mixed = step(split, **common)
    everywhere = step(lambda net: net.parameters(), **(common | own))
    nowhere = step(lambda net: net.parameters(), **common)
    assert_equal(mixed[:4], nowhere[:4])
    assert_equal(mixed[4:], everywhere[4:])
    assert not torch.equal(everywhere[4], nowhere[4]), "the setting matters"


def test_batchnorm_ratio_multiplies_the_damping_of_batchnorm_only() -> None:
    results = []
    for damping, ratio in [(0.1, 8.0), (0.1, 1.0), (0.8, 1.0)]:
        net = make_net()
        train(net, make_kfac(net, damping=damping, batchnorm_damping_ratio=ratio))
        results.append(weights(net))
    with_ratio, without, eightfold = results
    assert_equal(with_ratio[:2] + with_ratio[4:], without[:2] + without[4:])
    torch.testing.assert_close(with_ratio[2], eightfold[2], rtol=1e-14, atol=0)
    assert not torch.equal(with_ratio[2], without[2])


@pytest.mark.parametrize("name", ["lr", "momentum", "damping", "batchnorm_damping_ratio", "weight_decay", "ema_decay"])
@pytest.mark.parametrize("value", ["0.1", True, float("nan"), float("inf"), [0.1]])
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a number .*, got {re.escape(repr(value))}$"):
        make_kfac(make_net(), **{name: value})


@pytest.mark.parametrize("lr", [np.float32(0.25), torch.tensor(0.25)])
def test_numbers_of_other_libraries_are_numbers(lr: Any) -> None:
    nets = make_net(), make_net()
    for net, value in zip(nets, (0.25, lr), strict=True):
        train(net, make_kfac(net, lr=value), steps=2)
    assert all(map(torch.equal, weights(nets[0]), weights(nets[1])))


@pytest.mark.parametrize("optimizer_class", [KFAC, SGD])
def test_named_parameters_and_groups_of_them_are_accepted(optimizer_class: type[KFAC | SGD]) -> None:
    results = []
    for params in (
        lambda net: None,
        lambda net: net.parameters(),
        lambda net: net.named_parameters(),
        lambda net: [{"params": list(net.named_parameters())[:4]}, {"params": list(net.named_parameters())[4:]}],
    ):
        net = make_net()
        optimizer = optimizer_class(net, create_communicator("reduce"), params=params(net))
        train(net, optimizer, steps=2)
        results.append(weights(net))
    for result in results[1:]:
        assert_equal(result, results[0])


def test_a_group_with_frozen_parameters_only_is_left_alone() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    before = weights(net)
    groups = [{"params": net[0].parameters()}, {"params": [*net[1].parameters(), *net[4].parameters()]}]
    train(net, make_kfac(net, params=groups, weight_rescaling="always"))
    assert_equal(weights(net)[:2], before[:2])
    assert not torch.equal(weights(net)[4], before[4])


def test_parameters_not_given_do_not_move() -> None:
    for optimizer_class in (KFAC, SGD):
        net = make_net()
        before = weights(net)
        settings = {"weight_decay": 0.1, "weight_rescaling": "always"}
        optimizer = optimizer_class(net, create_communicator("reduce"), params=net[0].parameters(), **settings)
        train(net, optimizer, steps=2)
        assert_equal(weights(net)[2:], before[2:])
        assert not torch.equal(weights(net)[0], before[0])


# What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("lr", -0.1, "a number ≥ 0"),
        ("lr", float("nan"), "a number ≥ 0"),
        ("momentum", 1.0, r"a number in \[0, 1\)"),
        ("momentum", -0.1, r"a number in \[0, 1\)"),
        ("damping", 0.0, "a number > 0"),
        ("damping", -0.1, "a number > 0"),
        ("batchnorm_damping_ratio", 0.0, "a number > 0"),
        ("weight_decay", -1.0, "a number ≥ 0"),
        ("weight_rescaling", "sometimes", "one of always, cap, off"),
        ("batchnorm", "block", "one of full, unit, diagonal"),
        ("ema_decay", 1.0, r"a number in \(0, 1\), or None"),
        ("sample_fraction", 0.0, r"a number in \(0, 1\]"),
        ("sample_fraction", 1.5, r"a number in \(0, 1\]"),
        ("sample_fraction", float("nan"), r"a number in \(0, 1\]"),
        ("sample_fraction", "0.5", r"a number in \(0, 1\]"),
        ("sample_fraction", None, r"a number in \(0, 1\]"),
        ("sample_fraction", True, r"a number in \(0, 1\]"),
        ("ema_decay", 0.0, r"a number in \(0, 1\), or None"),
        ("refresh", 0, "an integer ≥ 1 or a RefreshSchedule"),
        ("refresh", 1.5, "an integer ≥ 1 or a RefreshSchedule"),
        ("accumulation_steps", 0, "an integer ≥ 1, or None"),
        ("skip", "head*", "a list of patterns"),
    ],
)
def test_a_bad_setting_is_refused_with_name_value_and_rule(setting: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^{setting} must be {rule}, got '?{str(value).replace('*', '.')}'?$"):
        make_kfac(make_net(), **{setting: value})


def test_a_part_of_the_samples_is_refused_where_all_would_be_taken() -> None:
    with pytest.raises(ValueError, match=r"^sample_fraction must be 1 where num_samples is given, .*, got 0\.25$"):
        make_kfac(make_net(), num_samples=8, sample_fraction=0.25)
    assert make_kfac(make_net(), num_samples=8, sample_fraction=1).num_samples == 8
    optimizer = make_kfac(make_net(), sample_fraction=0.25)
    with pytest.raises(ValueError, match=r"^sample_fraction must be 1 where num_samples is given, .*, got 0\.25$"):
        optimizer.num_samples = 8
    optimizer.num_samples = None


def test_a_bad_setting_of_a_group_is_refused() -> None:
    net = make_net()
    with pytest.raises(ValueError, match="damping must be a number > 0, got -3"):
        make_kfac(net, params=[{"params": net.parameters(), "damping": -3}])
    with pytest.raises(ValueError, match="weight_rescaling must be one of always, cap, off, got 'allways'"):
        SGD(net, create_communicator("reduce"), weight_rescaling="allways")  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer_class", [KFAC, SGD])
def test_nothing_to_train_is_refused(optimizer_class: type[KFAC | SGD]) -> None:
    with pytest.raises(ValueError, match="params must"):
        optimizer_class(make_net().requires_grad_(False), create_communicator("reduce"))


def test_parameters_of_something_else_than_the_model_are_refused() -> None:
    net = make_net()
    temperature = nn.Parameter(torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"params must be parameters of the model, got .*\(7,\)"):
        make_kfac(net, params=[*net.parameters(), temperature])


def test_groups_cannot_be_added_later() -> None:
    optimizer = make_kfac(make_net())
    with pytest.raises(ValueError, match="give them all to the constructor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", [name for name in kfac_dist.__all__ if name != "__version__"])
def test_each_exported_name_is_what_it_says(name: str) -> None:
    assert getattr(kfac_dist, name).__name__ == name


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LARS", "Muon"])
def test_the_baselines_serve_a_script_of_ones_own(name: str) -> None:
    torch.manual_seed(0)
    model, images, labels = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(32, 6),
        torch.arange(32) % 3,
    )
    optimizer = getattr(kfac_dist, name)(model, lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]

"""Habits that would go wrong silently: they work or are refused by name. One process."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, SGD, LossScaler, create_communicator
from tests.small_net import backward, make_batch, make_net, train, weights

OPTIMIZERS = [KFAC, SGD]


def make(kind: type[KFAC | SGD], model: nn.Module, **settings: Any) -> KFAC | SGD:
    return kind(model, create_communicator("reduce"), **settings)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda net: (net.parameters(),), "takes the model itself first, not generator"),
        (lambda net: (list(net.parameters()),), "takes the model itself first, not list"),
        (lambda net: (net, 0.1), "takes a communicator second, from create_communicator.., or None, got 0.1"),
        (lambda net: (nn.DataParallel(net),), "DataParallel"),
    ],
)
def test_wrong_arguments_are_told_what_to_pass(kind: type[KFAC | SGD], arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind(*arguments(make_net()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_of_an_optimizer_is_refused(kind: type[KFAC | SGD], copied: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
        copied(make(kind, make_net()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_is_refused(kind: type[KFAC | SGD], unscales: bool) -> None:
    net = make_net()
    optimizer = make(kind, net)
    before = weights(net)
    scaler = torch.amp.GradScaler("cpu")
    x, y = make_batch()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    if unscales:
        scaler.unscale_(optimizer)
    with pytest.raises(TypeError, match=r"GradScaler cannot drive (KFAC|SGD).*LossScaler"):
        scaler.step(optimizer)
    assert all(map(torch.equal, before, weights(net)))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_disabled_grad_scaler_changes_nothing(kind: type[KFAC | SGD]) -> None:
    net = make_net()
    optimizer = make(kind, net)
    before = weights(net)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = make_batch()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaler.step(optimizer)
    assert not torch.equal(before[0], weights(net)[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_sparse_gradient_is_refused_by_name(kind: type[KFAC | SGD]) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = make(kind, model)
    model(torch.tensor([[1, 2], [3, 4]])).square().mean().backward()
    with pytest.raises(ValueError, match=r"0.weight is sparse.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_expanded_buffers_take_rank_0s_values(kind: type[KFAC | SGD]) -> None:
    model = make_net()
    model.register_buffer("mask", torch.ones(1, 1, dtype=torch.float64).expand(3, 4))
    make(kind, model)
    assert torch.equal(model.get_buffer("mask"), torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_is_of_the_averaged_unscaled_gradient(kind: type[KFAC | SGD], scaled: bool) -> None:
    """Without a Fisher both move by the clipped gradient alone."""
    scaler = LossScaler(2.0**10) if scaled else None
    net, reference = make_net(), make_net()
    skip = {"skip": ["*"]} if kind is KFAC else {}
    optimizer = make(kind, net, lr=0.5, momentum=0.0, max_grad_norm=0.05, loss_scaler=scaler, **skip)
    x, y = make_batch()
    loss = F.cross_entropy(net(x), y)
    (loss if scaler is None else scaler.scale_loss(loss)).backward()
    optimizer.step()

    backward(reference)
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    assert norm > 0.1, "clipping has something to do"
    torch.optim.SGD(reference.parameters(), lr=0.5).step()
    for ours, theirs in zip(weights(net), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_large_norm_clips_nothing(kind: type[KFAC | SGD]) -> None:
    nets = make_net(), make_net()
    for net, norm in zip(nets, (None, 1e6), strict=True):
        train(net, make(kind, net, lr=0.01, max_grad_norm=norm), steps=2)
    assert all(map(torch.equal, weights(nets[0]), weights(nets[1])))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("norm", [0.0, -1.0, "1", True, float("nan")])
def test_a_norm_to_clip_to_must_be_positive(kind: type[KFAC | SGD], norm: Any) -> None:
    with pytest.raises(ValueError, match=f"max_grad_norm must be a number > 0, or None not to clip, got {norm!r}"):
        make(kind, make_net(), max_grad_norm=norm)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scaler", [False, 1024.0, torch.amp.GradScaler("cpu", enabled=False)])
def test_another_loss_scaler_is_refused(kind: type[KFAC | SGD], scaler: Any) -> None:
    with pytest.raises(ValueError, match=r"^loss_scaler must be a kfac_dist\.LossScaler, or None"):
        make(kind, make_net(), loss_scaler=scaler)


def test_a_weight_of_two_layers_is_rescaled_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer = make(SGD, model, lr=0.0, weight_rescaling="always")
    with torch.no_grad():
        first.weight.mul_(1e-9)  # where the 1e-9 of Eq. 18 shows: once and twice differ
    norm = first.weight.norm()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    expected: Tensor = 8**0.5 * norm / (norm + 1e-9)
    assert first.weight.norm().item() == pytest.approx(expected.item(), rel=1e-5)


# Freezing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("through", ["optimizer", "model"])  # whose zero_grad is called
def test_what_is_unfrozen_later_is_trained(kind: type[KFAC | SGD], through: str) -> None:
    net = make_net()
    net[4].requires_grad_(False)
    optimizer = make(kind, net, lr=0.05, weight_decay=0.01)
    train(net, optimizer, steps=2)
    frozen = weights(net)[4]
    net[4].requires_grad_(True)
    for step in (2, 3):
        (optimizer if through == "optimizer" else net).zero_grad()
        backward(net, step)
        optimizer.step()
    assert not torch.equal(weights(net)[4], frozen)
    if isinstance(optimizer, KFAC):
        assert not optimizer.uncovered
        assert "4" in optimizer.state_dict()["kfac"]["blocks"]
        assert optimizer.state_dict()["kfac"]["blocks"]["4"]["solvers"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stale_gradient", [False, True])
def test_what_is_frozen_later_stays(kind: type[KFAC | SGD], stale_gradient: bool) -> None:
    net = make_net()
    optimizer = make(kind, net, lr=0.05, weight_decay=0.1)
    train(net, optimizer, steps=2)
    if not stale_gradient:
        optimizer.zero_grad()
    net[0].requires_grad_(False)
    before = weights(net)
    for step in (2, 3, 4):
        if not stale_gradient or step > 2:
            optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    after = weights(net)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[4], after[4])


def test_layers_that_stay_keep_their_fisher_when_others_are_unfrozen() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = KFAC(net, create_communicator("reduce"), ema_decay=0.9, refresh=10)
    train(net, optimizer, steps=3)
    saved = {name: value.clone() for name, value in optimizer._fisher.owned["4"].running.items()}
    net[0].requires_grad_(True)
    train(net, optimizer, steps=1, first=3)
    for name, value in optimizer._fisher.owned["4"].running.items():
        assert torch.equal(value, saved[name])
    assert optimizer._fisher.owned["0"].solvers, "a layer that is new is refreshed at once"


def test_unfreezing_gives_what_a_new_optimizer_gives() -> None:
    """With no momentum and a refresh every iteration, the past leaves no trace."""
    nets = make_net(), make_net()
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.0}
    nets[0][4].requires_grad_(False)
    optimizer = KFAC(nets[0], create_communicator("reduce"), **settings)
    train(nets[0], optimizer, steps=2)
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0][4].requires_grad_(True)
    train(nets[0], optimizer, steps=2, first=2)
    train(nets[1], KFAC(nets[1], create_communicator("reduce"), **settings), steps=2, first=2)
    for ours, theirs in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# Layouts ----------------------------------------------------------------------------------------------------


def test_layouts_of_a_sequence_give_the_same_update_with_the_number_of_samples() -> None:
    sequences, tokens, features = 6, 4, 5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, tokens, features, dtype=torch.float64, generator=generator)
    y = torch.randn(sequences, tokens, 3, dtype=torch.float64, generator=generator)
    layouts = [
        lambda values: values,
        lambda values: values.flatten(0, 1),
        lambda values: values.transpose(0, 1).contiguous(),
    ]

    def train_with(layout: Any, num_samples: int | None) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(features, 3).double()
        optimizer = KFAC(layer, create_communicator("reduce"), lr=0.1, damping=0.01, num_samples=num_samples)
        F.mse_loss(layer(layout(x)), layout(y)).backward()
        optimizer.step()
        return layer.weight.detach()

    expected = train_with(layouts[0], None)
    for layout in layouts:
        torch.testing.assert_close(train_with(layout, sequences), expected, rtol=1e-12, atol=1e-13)
    assert (train_with(layouts[1], None) - expected).abs().max() > 1e-3, "the layout matters without it"

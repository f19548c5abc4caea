"""Loss scaling: the rule, exact unscaling, and an overflow that leaves everything as it was."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, SGD, LossScaler, create_communicator
from tests.small_net import assert_equal, backward, make_batch, make_net, running, train, weights


class Overflow:
    """A scaler's view of one update: give it a buffer that holds inf, or not."""

    def __init__(self, scaler: LossScaler) -> None:
        self.scaler = scaler
        self.communicator = create_communicator("reduce")

    def step(self, *values: float) -> bool:
        return self.scaler.overflowed([torch.tensor(values), torch.zeros(0)], self.communicator)


def test_the_scale_halves_on_overflow_and_doubles_after_enough_good_updates() -> None:
    update = Overflow(LossScaler(1024.0, growth_interval=3))
    scales = []
    for bad in (False, False, True, False, False, False, True, True, False):
        assert update.step(1.0, float("inf") if bad else 2.0) is bad
        scales.append(update.scaler.scale)
    assert scales == [1024, 1024, 512, 512, 512, 1024, 512, 256, 256]
    assert update.scaler.num_overflows == 3


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_every_value_that_is_not_finite_counts(value: float) -> None:
    assert Overflow(LossScaler()).step(0.0, value, 1.0)
    assert not Overflow(LossScaler()).step(0.0, 3e38, -1.0)


def test_an_overflow_without_a_scale_says_that_no_scale_can_help() -> None:
    update = Overflow(LossScaler(2.0))
    exhausted = []
    for bad in (True, True, True, False):
        update.step(float("nan") if bad else 1.0)
        exhausted.append(update.scaler.is_exhausted)
    assert exhausted == [False, True, True, False]
    assert update.scaler.scale == 1.0


def test_the_scale_stays_below_its_ceiling() -> None:
    update = Overflow(LossScaler(2.0**24, growth_interval=1))
    update.step(1.0)
    assert update.scaler.scale == 2.0**24


def test_the_state_goes_on() -> None:
    one = Overflow(LossScaler(64.0, growth_interval=3))
    for value in (1.0, float("inf"), 1.0, 1.0):
        one.step(value)
    other = Overflow(LossScaler(growth_interval=3))
    other.scaler.load_state_dict(one.scaler.state_dict())
    for update in (one, other):
        update.step(1.0)
    assert (other.scaler.scale, other.scaler.num_overflows) == (one.scaler.scale, one.scaler.num_overflows) == (64.0, 1)


@pytest.mark.parametrize(
    ("setting", "value"), [("scale", 1000.0), ("scale", 0.5), ("growth_interval", 0), ("num_losses", 0)]
)
def test_bad_settings_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{setting} must be .*, got {value}"):
        LossScaler(**{setting: value})  # type: ignore[arg-type]


# In the optimizers ---------------------------------------------------------------------------------------


def make(kind: str, model: nn.Module, scaler: LossScaler | None, **settings: Any) -> KFAC | SGD:
    communicator = create_communicator("reduce")
    if kind == "sgd":
        return SGD(model, communicator, lr=0.1, weight_rescaling="cap", loss_scaler=scaler, **settings)
    return KFAC(model, communicator, lr=0.1, ema_decay=0.5, weight_rescaling="cap", loss_scaler=scaler, **settings)


def scaled_backward(model: nn.Module, scaler: LossScaler, step: int) -> None:
    x, y = make_batch(step)
    scaler.scale_loss(F.cross_entropy(model(x), y)).backward()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_a_scaled_run_equals_one_without_bit_for_bit(kind: str, accumulated: int) -> None:
    """Powers of two leave the digits alone; the losses of one update are as large as one alone."""
    settings = {"accumulation_steps": accumulated} if kind == "kfac" else {}
    plain, scaled = make_net(), make_net()
    optimizers = [make(kind, plain, None, **settings)]
    scaler = LossScaler(2.0**10, growth_interval=2, num_losses=accumulated)
    optimizers.append(make(kind, scaled, scaler, **settings))
    for step in range(5):
        for net, optimizer in zip((plain, scaled), optimizers, strict=True):
            optimizer.zero_grad()
            for micro_batch in range(accumulated):
                x, y = make_batch(10 * step + micro_batch)
                loss = F.cross_entropy(net(x), y) / accumulated
                (scaler.scale_loss(loss) if net is scaled else loss).backward()
            optimizer.step()
    assert scaler.scale == 2.0**12
    assert_equal(weights(scaled), weights(plain))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of weights, momentum and running Fisher and its inverses."""
    state = copy.deepcopy(optimizer.state_dict())
    tensors = weights(model) + [value["momentum_buffer"] for value in state["state"].values()]
    for block in state.get("kfac", {}).get("blocks", {}).values():
        tensors += [*block["running"].values(), *block["solvers"].values()]
    return tensors


@pytest.mark.parametrize("place", ["loss", "gradient", "input"])
@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_an_overflow_changes_nothing_and_the_run_goes_on_as_if_it_had_not_been(kind: str, place: str) -> None:
    nets, results = (make_net(), make_net()), []
    for number, net in enumerate(nets):
        scaler = LossScaler()
        optimizer = make(kind, net, scaler)
        for step in range(4):
            if number and step == 2:
                before = everything(net, optimizer)
                optimizer.zero_grad()
                x, y = make_batch(7)
                x[0, 0, 0, 0] = float("inf") if place == "input" else 0.0
                loss = scaler.scale_loss(F.cross_entropy(net(x), y))
                (loss * float("inf") if place == "loss" else loss).backward()
                if place == "gradient":
                    next(net.parameters()).grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
                optimizer.step()
                assert scaler.num_overflows == 1
                assert_equal(everything(net, optimizer), before)
            optimizer.zero_grad()
            scaled_backward(net, scaler, step)
            optimizer.step()
        results.append(everything(net, optimizer))
    assert_equal(results[1], results[0])


def test_an_overflow_in_the_statistics_alone_is_found() -> None:
    """The gradients of a layer can be finite where the squares in its Fisher are not."""
    net = make_net()
    scaler = LossScaler()
    optimizer = make("kfac", net, scaler)
    scaled_backward(net, scaler, 0)
    optimizer.step()
    before = running(optimizer)
    optimizer.zero_grad()
    scaled_backward(net, scaler, 1)
    optimizer._fisher.factors.copies(("0", "A"))[0][5] = float("inf")  # type: ignore[union-attr]
    optimizer.step()
    assert scaler.num_overflows == 1
    after = running(optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_without_a_scaler_nothing_is_checked() -> None:
    net = make_net()
    optimizer = make("kfac", net, None)
    train(net, optimizer)
    optimizer.zero_grad()
    backward(net)
    next(net.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    optimizer.step()
    assert not all(bool(weight.isfinite().all()) for weight in weights(net))

"""Saving and loading: `state_dict`, `load_state_dict`, through a file and without. One process."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from kfac_dist import KFAC, SGD, create_communicator
from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, running, train, weights


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return loaded


@pytest.mark.parametrize("passage", [copy.deepcopy, through_file])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.7, "batchnorm": "unit", "weight_decay": 0.01, "weight_rescaling": "always"},
        {"refresh": 3, "batchnorm": "full"},  # saved after 5 steps: two into the third interval
        {"refresh": 2, "ema_decay": 0.9, "skip": ["4"]},
    ],
    ids=["plain", "average", "stale", "stale average"],
)
def test_a_loaded_run_continues_bit_for_bit(settings: dict[str, Any], passage: Any) -> None:
    net = make_net()
    optimizer = make_kfac(net, **settings)
    train(net, optimizer, steps=5)
    saved = passage({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, steps=4, first=5)

    other = make_net(seed=1)
    resumed = make_kfac(other, **settings)
    train(other, resumed, steps=2, first=50)  # what it had before must not matter
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, steps=4, first=5)
    assert_equal(weights(other), weights(net))
    assert_equal(list(running(resumed).values()), list(running(optimizer).values()))
    assert resumed.state_dict()["kfac"]["iteration"] == 9


def test_the_settings_of_groups_and_their_schedule_are_restored() -> None:
    def build() -> Any:
        net = make_net()
        groups = [{"params": net[0].parameters(), "damping": 0.5}, {"params": net[4].parameters()}]
        optimizer = make_kfac(net, params=groups, lr=0.2, weight_rescaling="cap")
        return net, optimizer, LambdaLR(optimizer, lambda step: 0.5**step)

    net, optimizer, scheduler = build()
    train(net, optimizer, steps=2)
    scheduler.step()
    optimizer.param_groups[1]["momentum"] = 0.25
    saved = through_file(
        {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": scheduler.state_dict()}
    )
    other, resumed, resumed_scheduler = build()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["schedule"])
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.1]
    assert [group["momentum"] for group in resumed.param_groups] == [0.9, 0.25]
    assert [group["damping"] for group in resumed.param_groups] == [0.5, 0.03]
    for model, each, schedule in ((net, optimizer, scheduler), (other, resumed, resumed_scheduler)):
        for step in (2, 3):
            # The damping of a loaded group is read, not that of the constructor.
            each.param_groups[0]["damping"] = 0.25
            train(model, each, first=step)
            schedule.step()
    assert_equal(weights(other), weights(net))


def test_between_refreshes_the_stored_inverses_are_used_not_recomputed() -> None:
    net = make_net()
    optimizer = make_kfac(net, refresh=3, damping=0.1)
    train(net, optimizer, steps=4)
    saved = through_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, steps=2, first=4)

    other = make_net()
    resumed = make_kfac(other, refresh=3, damping=0.1)
    other.load_state_dict(saved["model"])
    for block in saved["optimizer"]["kfac"]["blocks"].values():
        for matrix in block["running"].values():
            matrix.fill_(torch.nan)  # an inverse made of this would show
    resumed.load_state_dict(saved["optimizer"])
    resumed.param_groups[0]["damping"] = 10.0
    train(other, resumed, steps=2, first=4)
    assert_equal(weights(other), weights(net))


def test_statistics_captured_before_loading_are_dropped() -> None:
    net, other = make_net(), make_net()
    optimizer, disturbed = make_kfac(net), make_kfac(other)
    train(net, optimizer)
    saved = copy.deepcopy({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    backward(other, step=7)
    for parameter in other.parameters():
        parameter.grad = None
    other.load_state_dict(saved["model"])
    disturbed.load_state_dict(saved["optimizer"])
    for model, each in ((net, optimizer), (other, disturbed)):
        for parameter in model.parameters():
            parameter.grad = None
        backward(model, step=1)
        each.step()
    assert_equal(weights(other), weights(net))


def test_training_on_does_not_change_the_loaded_state() -> None:
    net = make_net()
    optimizer = make_kfac(net, ema_decay=0.5)
    train(net, optimizer, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    resumed = make_kfac(net, ema_decay=0.5)
    resumed.load_state_dict(saved)
    train(net, resumed, steps=2)
    for name, block in untouched["kfac"]["blocks"].items():
        for kind in ("running", "solvers"):
            for matrix, value in block[kind].items():
                assert torch.equal(saved["kfac"]["blocks"][name][kind][matrix], value)
        assert saved["kfac"]["blocks"][name]["num_averaged"] == block["num_averaged"]
    assert saved["kfac"]["iteration"] == 2


# Precision -----------------------------------------------------------------------------------------------


def kfac_tensors(state: dict[str, Any]) -> list[Tensor]:
    return [
        value
        for block in state["kfac"]["blocks"].values()
        for kind in ("running", "solvers")
        for value in block[kind].values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fisher_of_a_half_precision_model_stays_in_fp32(dtype: torch.dtype) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x, y = make_batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()

    net = make_net().to(dtype)
    optimizer = make_kfac(net, ema_decay=0.5, refresh=2)
    for number in range(2):
        step(net, optimizer, number)
    saved = through_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    other = make_net(seed=1).to(dtype)
    resumed = make_kfac(other, ema_decay=0.5, refresh=2)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for state in (saved["optimizer"], resumed.state_dict()):
        tensors = kfac_tensors(state)
        assert len(tensors) == 10
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    for one, two in zip(kfac_tensors(saved["optimizer"]), kfac_tensors(resumed.state_dict()), strict=True):
        assert torch.equal(one, two)
    for number in (2, 3):
        step(net, optimizer, number)
        step(other, resumed, number)
    assert_equal(weights(other), weights(net))
    assert all(weight.dtype == dtype and bool(weight.isfinite().all()) for weight in weights(net))


def test_the_fisher_of_a_half_precision_model_is_that_of_its_rounded_tensors() -> None:
    """A from bf16 activations, multiplied in fp32: exact for the first layer, whose input has no rounding error."""
    net = make_net().to(torch.bfloat16)
    optimizer = make_kfac(net)
    x, y = make_batch()
    F.cross_entropy(net(x.bfloat16()).float(), y).backward()
    optimizer.step()
    patches = F.unfold(x.bfloat16().double(), 3, padding=1)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
    expected = torch.einsum("nit, njt -> ij", patches, patches) / len(x)
    torch.testing.assert_close(running(optimizer)["0.A"][0].double(), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_fisher_is_fp32_and_close_to_that_without() -> None:
    results = []
    for enabled in (False, True):
        net = make_net().float()
        optimizer = make_kfac(net)
        x, y = make_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(net(x.float()), y)
        loss.backward()
        optimizer.step()
        results.append(running(optimizer))
    full, mixed = results
    for name, matrix in full.items():
        assert mixed[name].dtype == torch.float32
        relative = (mixed[name] - matrix).norm() / matrix.norm()
        assert relative < 0.03, f"{name}: {relative:.3f}"  # bf16 rounds to 0.4 %


# Refusals ------------------------------------------------------------------------------------------------


def test_the_state_of_another_optimizer_or_model_is_refused_and_changes_nothing() -> None:
    net = make_net()
    optimizer = make_kfac(net)
    train(net, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    sgd = SGD(make_net(), create_communicator("reduce"))
    with pytest.raises(ValueError, match='no "kfac" entry'):
        optimizer.load_state_dict(sgd.state_dict())
    partial = copy.deepcopy(before)
    del partial["kfac"]["blocks"]["1"]
    partial["kfac"]["iteration"] = 77
    with pytest.raises(ValueError, match=r"lacks the Fisher of 1 block that rank 0 owns \(1"):
        optimizer.load_state_dict(partial)
    after = optimizer.state_dict()
    assert after["kfac"]["iteration"] == 1
    assert_equal(kfac_tensors(after), kfac_tensors(before))


def test_sgd_continues_bit_for_bit_and_equals_torch() -> None:
    nets = [make_net(), make_net()]
    ours = SGD(nets[0], create_communicator("reduce"), lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for net, optimizer in zip(nets, (ours, theirs), strict=True):
        train(net, optimizer, steps=3)
    assert_equal(weights(nets[0]), weights(nets[1]))
    saved = through_file({"model": nets[0].state_dict(), "optimizer": ours.state_dict()})
    other = make_net(seed=1)
    resumed = SGD(other, create_communicator("reduce"))
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for net, optimizer in ((other, resumed), (nets[1], theirs)):
        train(net, optimizer, steps=2, first=3)
    assert_equal(weights(other), weights(nets[1]))


@pytest.mark.parametrize("differs", ["batchnorm", "skip", "width", "frozen bias", "frozen layer", "thawed layer"])
def test_a_state_of_another_model_is_refused_before_anything_changes(differs: str) -> None:
    """Defect: it was taken, and a later step failed or computed something else."""
    net, other = make_net(), make_net()
    settings: dict[str, Any] = {}
    if differs == "batchnorm":
        settings = {"batchnorm": "unit"}
    elif differs == "skip":
        settings = {"skip": ["4"]}
    elif differs == "width":
        other[4] = nn.Linear(75, 5).double()
    else:
        frozen = other if differs != "thawed layer" else net
        (frozen[4].bias if differs == "frozen bias" else frozen[4]).requires_grad_(False)
    optimizer, loading = make_kfac(net, refresh=10), make_kfac(other, refresh=10, **settings)
    train(net, optimizer, steps=2)
    layer = "1" if differs == "batchnorm" else "4"
    with pytest.raises(ValueError, match=f"the state does not fit the model: layer {layer} is .*(state|here)"):
        loading.load_state_dict(optimizer.state_dict())
    assert not loading.state
    assert loading.state_dict()["kfac"]["iteration"] == 0
    assert not running(loading)


def test_a_state_saved_while_frozen_goes_on_when_frozen_alike() -> None:
    """What is unfrozen after it is refreshed at once, since nothing is known of it."""
    net, other = make_net(), make_net()
    optimizer = make_kfac(net, refresh=100)
    train(net, optimizer, steps=1)
    net[4].requires_grad_(False)
    train(net, optimizer, steps=1)
    loading = make_kfac(other, refresh=100)
    other[4].requires_grad_(False)
    loading.load_state_dict(optimizer.state_dict())
    other.requires_grad_(True)
    train(other, loading, steps=1)
    assert loading.state_dict()["kfac"]["blocks"]["4"]["solvers"]


@pytest.mark.parametrize("full", [False, True])
def test_a_state_saved_between_unfreezing_and_a_step_fits_the_model_as_it_is(full: bool) -> None:
    """Defect: the state was of the model as it had been frozen at the last step, and could not be loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    model.requires_grad_(True)
    state = optimizer.full_state_dict() if full else optimizer.state_dict()
    KFAC(model, lr=0.1).load_state_dict(state)


def test_a_state_whose_parameters_are_in_another_order_is_refused() -> None:
    """Defect: layers of one shape took each other's momentum."""
    first, second = (make_kfac(nn.ModuleDict({name: nn.Linear(3, 3) for name in names})) for names in ("ab", "ba"))
    with pytest.raises(ValueError, match=r"another order .*: a\.weight in the place of b\.weight"):
        second.load_state_dict(first.state_dict())

"""Habits of users' loops that a hostile reviewer found to go wrong; each works as in torch or is refused by name."""

import copy
import gc
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.prune import custom_from_mask
from torch.nn.utils.prune import remove as remove_pruning

from kfac_dist import KFAC, LARS, SGD, AdamW, LossScaler, Muon, create_communicator
from kfac_dist.curvature.inversion import RefreshReport
from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, running, train, weights

OPTIMIZERS = [KFAC, SGD]


def make(kind: type[KFAC | SGD], model: nn.Module, **settings: Any) -> KFAC | SGD:
    return kind(model, create_communicator("reduce"), **settings)


# Models ----------------------------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Module):
    """Its name is all that is looked at."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DTensor(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", ["wrapped", "within", "parameters"])
def test_a_sharded_model_is_refused(kind: type[KFAC | SGD], how: str) -> None:
    """Defect: rank 0's shard was written over the others'."""
    model: nn.Module = FullyShardedDataParallel(make_net())
    if how == "within":
        model = nn.Sequential(model)
    if how == "parameters":
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.ones(2, 2).as_subclass(DTensor))
    with pytest.raises(TypeError, match=rf"{kind.__name__} cannot train a sharded model"):
        make(kind, model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_complex_parameters_are_refused(kind: type[KFAC | SGD]) -> None:
    """Defect: their imaginary part stayed as it was."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"1\.weight is complex.*leave it to another optimizer"):
        make(kind, model)
    make(kind, model, params=model[0].parameters())


def test_buffers_are_double_if_any_parameter_is() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    assert make_kfac(model)._dtype == torch.float64
    assert make_kfac(model[0])._dtype == torch.float32


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_model_converted_after_construction_is_refused(kind: type[KFAC | SGD]) -> None:
    """Defect: float64 gradients were rounded to float32."""
    model = nn.Linear(3, 2)
    optimizer = make(kind, model)
    model.double()
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError, match=r"weight was torch.float32 on cpu .* is torch.float64 on cpu now"):
        optimizer.step()


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_moved_after_construction_is_refused_in_its_forward(device: str) -> None:
    """Defect: the first backward ended in torch's words about an index_select on two devices."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = make_kfac(model)
    model.to(device)
    with pytest.raises(ValueError, match=rf"0 computes on {device}.* made for a model on cpu: move the model first"):
        model(torch.ones(2, 3, device=device))
    optimizer.close()
    model(torch.ones(2, 3, device=device)).square().sum().backward()


def test_parameters_on_two_devices_are_refused() -> None:
    """Defect: the first backward ended in torch's words about an index_select on two devices."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"params must be on one device .*, got cpu and meta"):
        make_kfac(model)
    make_kfac(model, params=model[0].parameters())


def prune(layer: nn.Module) -> None:
    custom_from_mask(layer, "weight", torch.eye(*layer.weight.shape))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", ["load_state_dict", "parameter", "pruned", "parametrized", "tied"])
def test_a_layer_whose_parameters_are_others_than_before_is_refused(kind: type[KFAC | SGD], how: str) -> None:
    """Defect: the model was not trained, or a pruned layer's gradient was taken for that of the weight in use."""
    net = make_net()
    net.append(nn.Linear(4, 4).double())
    optimizer = make(kind, net)
    train(net, optimizer)
    if how == "load_state_dict":
        net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    elif how == "parameter":
        net[5].weight = nn.Parameter(torch.ones_like(net[5].weight))
    elif how == "tied":
        net[5].bias = net[4].bias
    else:
        (prune if how == "pruned" else weight_norm)(net[5])
    if kind is SGD and how == "pruned":  # which trains the same parameter still
        train(net, optimizer)
        return
    name = "0" if how == "load_state_dict" else "5"
    with pytest.raises(ValueError, match=rf"^{name}[.a-z]* was replaced .*, pruned or parametrized since the optim"):
        train(net, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_that_the_model_gave_up_does_no_harm(kind: type[KFAC | SGD]) -> None:
    """An auxiliary head."""
    net = make_net()
    net.append(nn.Linear(4, 4).double())
    optimizer = make(kind, net)
    train(net, optimizer)
    head = net[5] if kind is KFAC else None
    del net[5]
    before = weights(net)
    train(net, optimizer)
    assert not torch.equal(weights(net)[0], before[0])
    assert head is None or head.weight.grad is None


def test_a_layer_with_a_plain_gradient_may_be_pruned_and_parametrized() -> None:
    net = make_net()
    optimizer = make_kfac(net, skip=["0", "4"])
    prune(net[4])
    spectral_norm(net[0])
    train(net, optimizer, steps=2)
    remove_pruning(net[4], "weight")
    train(net, optimizer, first=2)
    assert not running(optimizer).keys() - {"1.F"}


def test_weights_put_in_place_for_one_forward_leave_no_factors() -> None:
    """Defect: A and G were taken for those of the masked weight's gradient."""
    nets = make_net(), make_net()
    masks = [(torch.arange(weight.numel()) % 2).view_as(weight) for weight in nets[0].parameters()]
    plain, masked = make_kfac(nets[0], skip=["0", "4"]), make_kfac(nets[1])
    for net, optimizer in zip(nets, (plain, masked), strict=True):
        x, y = make_batch()
        named = zip(dict(net.named_parameters()).items(), masks, strict=True)
        used = {name: weight * mask for (name, weight), mask in named if not name.startswith("1.")}
        F.cross_entropy(torch.func.functional_call(net, used, (x,)), y).backward()
        optimizer.step()
    assert_equal(weights(nets[1]), weights(nets[0]))


def test_a_layer_whose_forward_was_replaced_gets_the_plain_gradient() -> None:
    """Defect: A and G were those of the type's own forward."""
    net = make_net()
    layer = net[4]
    layer.forward = lambda x: F.linear(x, layer.weight - layer.weight.mean(), layer.bias)
    assert [block.reason for block in make_kfac(net).uncovered] == ["its forward was replaced"]


@pytest.mark.parametrize("setting", ["stride", "padding", "eps"])
def test_a_layers_settings_may_change(setting: str) -> None:
    """Defect: the factors were those of the settings at the optimizer's construction."""
    results = []
    for changes in ("before", "after"):
        net = make_net()
        net[4] = nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, 4).double())
        net[3] = nn.Identity()
        changed = {"stride": (0, (2, 1)), "padding": (0, (0, 1)), "eps": (1, 0.5)}[setting]
        if changes == "before":
            setattr(net[changed[0]], setting, changed[1])
        optimizer = make_kfac(net)
        setattr(net[changed[0]], setting, changed[1])
        if setting == "padding":
            net[0]._reversed_padding_repeated_twice = [1, 1, 0, 0]
        train(net, optimizer, steps=2)
        results.append([*weights(net), *running(optimizer).values()])
    assert_equal(results[1], results[0])


# Freezing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [1, 100])
def test_a_zero_grad_while_frozen_changes_nothing(refresh: int) -> None:
    """GAN loops do so. Defect: it took momentum, Fisher and schedule away."""
    nets = make_net(), make_net()
    plain, toggled = (make_kfac(net, lr=0.05, ema_decay=0.9, refresh=refresh) for net in nets)
    for step in range(4):
        nets[1].requires_grad_(False)
        toggled.zero_grad()
        nets[1].requires_grad_(True)
        for net, optimizer in zip(nets, (plain, toggled), strict=True):
            train(net, optimizer, first=step)
    assert_equal(weights(nets[1]), weights(nets[0]))
    assert all(map(torch.equal, running(toggled).values(), running(plain).values()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_was_frozen_keeps_its_momentum(kind: type[KFAC | SGD]) -> None:
    net = make_net()
    optimizer = make(kind, net, lr=0.05)
    train(net, optimizer, steps=2)
    velocity = optimizer.state[net[4].weight]["momentum_buffer"].clone()
    net[4].requires_grad_(False)
    train(net, optimizer, first=2)
    assert torch.equal(optimizer.state[net[4].weight]["momentum_buffer"], velocity)


@pytest.mark.parametrize("when", ["forward", "backward"])  # what has run when another layer is unfrozen
def test_unfreezing_another_layer_keeps_what_was_captured(when: str) -> None:
    """Defect: all layers took the plain gradient in that step."""
    results = []
    for unfrozen_at in ("start", when):
        model = nn.ModuleDict({"net": make_net(), "other": nn.Linear(2, 2).double()})
        model["other"].requires_grad_(unfrozen_at == "start")
        optimizer = make_kfac(model, lr=0.05)
        x, y = make_batch()
        loss = F.cross_entropy(model["net"](x), y)
        if unfrozen_at == "forward":
            model["other"].requires_grad_(True)
            optimizer.zero_grad()
        loss.backward()
        model["other"].requires_grad_(True)
        optimizer.step()
        results.append(weights(model["net"]))
    assert_equal(results[1], results[0])


def test_a_layer_that_returns_otherwise_is_refreshed_at_once() -> None:
    """Defect: the schedule took it for refreshed, and it had no inverse until the interval was over."""
    net = make_net()
    optimizer = make_kfac(net, lr=0.01, refresh=100)
    train(net, optimizer, steps=1)
    net[4].bias.requires_grad_(False)
    train(net, optimizer, steps=1)
    assert optimizer.state_dict()["kfac"]["blocks"]["4"]["solvers"]


def test_a_layer_frozen_between_forward_and_backward_gives_nothing() -> None:
    net = make_net()
    optimizer = make_kfac(net)
    x, y = make_batch()
    loss = F.cross_entropy(net(x), y)
    net[4].requires_grad_(False)
    optimizer.zero_grad()
    loss.backward()
    assert optimizer._fisher.capture.captured == {"0", "1"}
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_with_everything_frozen_does_nothing(kind: type[KFAC | SGD], scaled: bool) -> None:
    net = make_net()
    optimizer = make(kind, net, loss_scaler=LossScaler() if scaled else None)
    net.requires_grad_(False)
    before = weights(net)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(weights(net), before)


# Gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rescaling", ["off", "always"])
def test_a_parameter_without_a_gradient_stays(kind: type[KFAC | SGD], rescaling: str) -> None:
    """As in torch. Defect: weight decay, momentum and rescaling moved it."""
    net = make_net()
    optimizer = make(kind, net, lr=0.05, weight_decay=0.1, weight_rescaling=rescaling)
    train(net, optimizer, steps=2)
    before = weights(net)
    optimizer.zero_grad()
    backward(net, 2)
    net[4].bias.grad = net[0].weight.grad = None
    optimizer.step()
    stayed = [torch.equal(now, then) for now, then in zip(weights(net), before, strict=True)]
    assert stayed == [True, False, False, False, False, True]
    assert net[4].bias.grad is None


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("refresh", [1, 10])
def test_a_step_without_any_gradient_does_nothing(kind: type[KFAC | SGD], refresh: int) -> None:
    net = make_net()
    settings = {"refresh": refresh} if kind is KFAC else {}
    scaler = LossScaler(2.0, growth_interval=1)
    optimizer = make(kind, net, lr=0.05, weight_decay=0.1, loss_scaler=scaler, **settings)
    train(net, optimizer)
    state, before, scale = copy.deepcopy(optimizer.state_dict()), weights(net), scaler.scale
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(weights(net), before)
    assert scaler.scale == scale
    if kind is KFAC:
        assert optimizer.state_dict()["kfac"]["iteration"] == state["kfac"]["iteration"] == 1
    for index, value in state["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][index]["momentum_buffer"], value["momentum_buffer"])


@pytest.mark.parametrize("how", ["zero_grad", "none"])
@pytest.mark.parametrize("loss_factor", [1.0, float("nan")])
def test_a_batch_dropped_with_its_gradients_leaves_no_factors(how: str, loss_factor: float) -> None:
    """Defect: only the optimizer's own zero_grad took the factors away."""
    nets = make_net(), make_net()
    clean, dropping = (make_kfac(net) for net in nets)
    for net in nets:
        net[1].momentum = 0.0
    x, y = make_batch(9)
    (F.cross_entropy(nets[1](x), y) * loss_factor).backward()
    if how == "zero_grad":
        nets[1].zero_grad()
    else:
        for parameter in nets[1].parameters():
            parameter.grad = None
    for net, optimizer in zip(nets, (clean, dropping), strict=True):
        backward(net)
        optimizer.step()
    assert_equal(weights(nets[1]), weights(nets[0]))


def test_a_layer_whose_gradients_were_dropped_last_gives_no_factors() -> None:
    net = make_net()
    optimizer = make_kfac(net)
    backward(net)
    net[4].zero_grad()
    optimizer.step()
    assert {name.split(".")[0] for name in running(optimizer)} == {"0", "1"}


@pytest.mark.parametrize("where", ["layer", "capture"])
def test_a_pass_that_failed_and_was_dropped_by_the_model_leaves_no_factors(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops that skip a batch for which memory was short. Defect: the next pass was counted as the second."""
    nets = make_net(), make_net()
    clean, failing = (make_kfac(net, momentum=0.0) for net in nets)
    nets[1][1].momentum = 0.0

    def fail(*arguments: Any) -> None:
        raise MemoryError

    x, y = make_batch(9)
    out = nets[1](x)
    with monkeypatch.context() as context:
        if where == "layer":
            out.grad_fn.register_prehook(fail)
        else:
            context.setattr(type(failing.blocks[2]), "output_moment", fail)
        with pytest.raises(MemoryError):
            F.cross_entropy(out, y).backward()
    nets[1].zero_grad()
    for net, optimizer in zip(nets, (clean, failing), strict=True):
        backward(net)
        optimizer.step()
    assert_equal(weights(nets[1]), weights(nets[0]))


def test_gradients_that_autograd_returns_were_not_dropped() -> None:
    """Two passes whose gradients are added up by hand equal two backward passes."""
    nets = make_net(), make_net()
    usual, by_hand = (make_kfac(net) for net in nets)
    totals = [torch.zeros_like(parameter) for parameter in nets[1].parameters()]
    for step in (0, 1):
        x, y = make_batch(step)
        (F.cross_entropy(nets[0](x), y) / 2).backward()
        gradients = torch.autograd.grad(F.cross_entropy(nets[1](x), y) / 2, list(nets[1].parameters()))
        totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
    for parameter, total in zip(nets[1].parameters(), totals, strict=True):
        parameter.grad = total
    usual.step()
    by_hand.step()
    for ours, theirs in zip(weights(nets[1]), weights(nets[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# Loss scaler, end, warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loss_scaler_serves_one_optimizer_at_a_time(kind: type[KFAC | SGD]) -> None:
    """Defect: the second unscaled with the scale that the first one's step had just set."""
    scaler = LossScaler()
    first = make(kind, make_net(), loss_scaler=scaler)
    with pytest.raises(ValueError, match="loss_scaler serves another optimizer already"):
        make(kind, make_net(), loss_scaler=scaler)
    first.close()
    second = make(kind, make_net(), loss_scaler=scaler)
    cycle: list[Any] = [second]
    cycle.append(cycle)
    del second, cycle
    gc.disable()
    try:
        make(kind, make_net(), loss_scaler=scaler)
    finally:
        gc.enable()


def test_a_loaded_loss_scaler_is_not_exhausted() -> None:
    scaler = LossScaler(1.0)
    state = scaler.state_dict()
    scaler.overflowed([torch.tensor([float("inf")])], create_communicator("reduce"))
    assert scaler.is_exhausted
    scaler.load_state_dict(state)
    assert not scaler.is_exhausted


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_after_close_is_refused(kind: type[KFAC | SGD]) -> None:
    net = make_net()
    optimizer = make(kind, net)
    optimizer.close()
    backward(net)
    with pytest.raises(RuntimeError, match=f"this {kind.__name__} was closed: make a new one"):
        optimizer.step()


def test_a_closed_optimizer_does_not_come_back() -> None:
    """Defect: a model that was frozen after the training, to be deployed, got the hooks again."""
    net = make_net()
    optimizer = make_kfac(net)
    train(net, optimizer)
    before = optimizer.state_dict()
    optimizer.close()
    net.requires_grad_(False)
    optimizer.zero_grad()
    assert optimizer.state_dict()["kfac"]["layers"] == before["kfac"]["layers"]
    with pytest.raises(RuntimeError, match="this KFAC was closed"):
        optimizer.load_state_dict(before)
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_blocks_that_keep_their_inverse_for_good_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net()
    optimizer = make_kfac(net, lr=0.01)
    train(net, optimizer)
    assert not caplog.records
    monkeypatch.setattr(optimizer._fisher.owned, "refresh", lambda *arguments: RefreshReport(3, 2))
    with caplog.at_level(logging.WARNING):
        train(net, optimizer, steps=3)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "K-FAC could not factorise the Fisher of 2 blocks even with more damping"
    ]


def test_a_models_copy_has_no_hooks_of_the_optimizer() -> None:
    net = make_net()
    optimizer = make_kfac(net)
    copied = copy.deepcopy(net)
    backward(copied)
    assert not optimizer._fisher.capture._given
    backward(net)
    assert optimizer._fisher.capture._given == {"0", "1", "4"}


# Settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KFAC, SGD, AdamW, LARS, Muon])
def test_a_setting_of_the_groups_is_no_attribute(kind: type[KFAC]) -> None:
    optimizer = make(kind, make_net())
    settings = optimizer.param_groups[0]
    for name in {"lr", "momentum", "damping", "weight_decay", "betas"} & set(settings):
        with pytest.raises(AttributeError, match=rf"for group in optimizer.param_groups: group\['{name}'\] = …"):
            setattr(optimizer, name, 0.5)
        assert not hasattr(optimizer, name)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (KFAC, "refresh", r"KFAC\(…, refresh=…\).*refresh=IntervalRefresh\(function of the iteration\)"),
        (KFAC, "ema_decay", r"KFAC\(…, ema_decay=…\)"),
        (KFAC, "max_grad_norm", r"KFAC\(…, max_grad_norm=…\)"),
        (KFAC, "skip", r"KFAC\(…, skip=…\)"),
        (SGD, "weight_rescaling", r"SGD\(…, weight_rescaling=…\)"),
        (Muon, "averaging", r"Muon\(…, averaging=…\)"),
    ],
)
def test_a_setting_of_the_constructor_is_no_attribute(kind: type[KFAC], name: str, said: str) -> None:
    optimizer = make(kind, make_net())
    with pytest.raises(AttributeError, match=f"{kind.__name__} has no attribute '{name}': .*{said}"):
        setattr(optimizer, name, 5)


def test_what_may_be_set_between_steps() -> None:
    optimizer = make(KFAC, make_net())
    optimizer.accumulation_steps, optimizer.num_samples = 2, 8
    assert (optimizer.accumulation_steps, optimizer.num_samples) == (2, 8)
    optimizer.of_the_users = 1

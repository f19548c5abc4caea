"""What users do with a model and its graphs between K-FAC's steps: copies, checkpointing, old graphs, autocast."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFAC, SGD, create_communicator
from tests.small_net import assert_equal, backward, make_batch, make_kfac, make_net, running, train, weights

# Copies of a model that K-FAC has hooked -----------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("waiting", [False, True], ids=["after a step", "before a backward"])
def test_a_copy_of_a_hooked_model_trains_on_its_own(copied: Callable[[nn.Module], nn.Module], waiting: bool) -> None:
    model, undisturbed = make_net(), make_net()
    optimizer, alone = make_kfac(model), make_kfac(undisturbed)
    train(model, optimizer)
    train(undisturbed, alone)
    x, y = make_batch(1)
    loss = F.cross_entropy(model(x), y) if waiting else None
    twin = copied(model)
    assert_equal(weights(twin), weights(model))

    # Without an optimizer its hooks do nothing: the original sees none of it.
    backward(twin, step=7)
    assert not optimizer._fisher.capture.captured
    # With one of its own it goes as a fresh model does, and the original on as if there were no copy.
    fresh = make_net()
    fresh.load_state_dict(twin.state_dict())
    for each in (twin, fresh):
        train(each, make_kfac(each), steps=2, first=3)
    assert_equal(weights(twin), weights(fresh))
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) if loss is None else loss).backward()
    optimizer.step()
    train(undisturbed, alone, first=1)
    assert_equal(weights(model), weights(undisturbed))
    assert not torch.equal(weights(twin)[0], weights(model)[0])


# Activation checkpointing --------------------------------------------------------------------------------

DEPTH = 6


def forward_and_backward(checkpointed: bool) -> tuple[int, dict[str, Tensor]]:
    """How many of the layers' inputs are alive after the forward, and the factors."""
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(5, 5), nn.Tanh())]
    model = nn.Sequential(*layers).double()
    optimizer = make_kfac(model)
    inputs: list[StorageWeakRef] = []
    for layer in model[::2]:
        layer.register_forward_pre_hook(lambda _, x: inputs.append(StorageWeakRef(x[0].untyped_storage())))
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = (checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)).square().mean()
    num_alive = sum(not storage.expired() for storage in inputs)
    loss.backward()
    optimizer.step()
    return num_alive, running(optimizer)


def test_activation_checkpointing_keeps_no_inputs_for_kfac() -> None:
    all_alive, factors = forward_and_backward(checkpointed=False)
    alive, checkpointed = forward_and_backward(checkpointed=True)
    assert all_alive == DEPTH
    assert alive == 1, "the model's input alone, which is the caller's"
    assert factors.keys() == checkpointed.keys()
    assert_equal(list(checkpointed.values()), list(factors.values()))


# Graphs --------------------------------------------------------------------------------------------------


def change_input_in_place(model: nn.Sequential, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model[0](torch.ones(3, 4)).float()  # in fp32, as after a BatchNorm
        output = model[1](hidden)
        hidden.add_(1)  # the layer itself keeps a copy in bf16, so autograd does not mind
        loss = output.float().square().mean()
    loss.backward()


def test_an_input_changed_in_place_under_autocast_is_found_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    change_input_in_place(model, autocast=True)  # as it goes without K-FAC
    optimizer = make_kfac(model)
    with pytest.raises(RuntimeError, match=r"the input of 1 was changed in place.*or leave the layer out with skip"):
        change_input_in_place(model, autocast=True)
    assert "1" not in optimizer._fisher.capture.captured


def test_a_backward_through_a_graph_from_before_the_last_step_leaves_no_factors() -> None:
    """Only the gradient, which `zero_grad` drops, as of any optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()  # its weight is not needed in the backward, so autograd lets it pass
    undisturbed = copy.deepcopy(model)
    optimizer, alone = (make_kfac(each, ema_decay=0.5) for each in (model, undisturbed))

    def loss_of(each: nn.Module, seed: int) -> Tensor:
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return F.cross_entropy(each(x), torch.arange(8) % 3)

    old = loss_of(model, seed=9)
    for each, own in ((model, optimizer), (undisturbed, alone)):
        own.zero_grad(set_to_none=False)
        loss_of(each, seed=0).backward()
        own.step()
    optimizer.zero_grad()
    alone.zero_grad()
    loss_of(model, seed=1).backward()
    loss_of(undisturbed, seed=1).backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    old.backward()
    assert optimizer._fisher.capture.num_passes == 1
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        assert not torch.equal(parameter.grad, gradient)
        parameter.grad = gradient
    optimizer.step()
    alone.step()
    assert_equal(list(running(optimizer).values()), list(running(alone).values()))
    assert_equal(weights(model), weights(undisturbed))


@pytest.mark.parametrize("kind", [KFAC, SGD])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_inside_autocast_equals_one_outside(kind: type[KFAC | SGD], dtype: torch.dtype) -> None:
    results = []
    for enabled in (False, True):
        model = make_net().float()
        settings: dict[str, Any] = {"lr": 1e-3, "weight_rescaling": "cap"}
        if kind is KFAC:
            settings |= {"damping": 1e-3, "refresh": 3}  # between refreshes gradients are multiplied with inverses
        optimizer = kind(model, create_communicator("reduce"), **settings)
        for step in range(3):
            x, y = make_batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            with torch.autocast("cpu", dtype, enabled=enabled):
                optimizer.step()
        assert all(bool(weight.isfinite().all()) for weight in weights(model))
        results.append(weights(model))
    assert_equal(results[1], results[0])


# Clipping ------------------------------------------------------------------------------------------------


def test_the_clipped_gradient_is_preconditioned_with_the_factors_of_the_whole_one() -> None:
    """One sample, one layer: F + γI and the gradient are written down, clipped and solved here."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    optimizer = make_kfac(model, lr=0.5, momentum=0.0, damping=0.04, max_grad_norm=2.0)
    (model(torch.tensor([[3.0, 4.0]], dtype=torch.float64)) * torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    # a = (3, 4), g = (1, 2): A = a aᵀ of mean diagonal 25/2, G = g gᵀ of mean diagonal 5/2, so π = √5; γ = 0.2².
    identity = torch.eye(2, dtype=torch.float64)
    A = torch.tensor([[9.0, 12.0], [12.0, 16.0]], dtype=torch.float64) + 5**0.5 * 0.2 * identity
    G = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64) + 0.2 / 5**0.5 * identity
    gradient = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)  # of norm √125
    clipped = gradient * 2.0 / (125**0.5 + 1e-6)
    expected = -0.5 * torch.linalg.inv(G) @ clipped @ torch.linalg.inv(A)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-14)

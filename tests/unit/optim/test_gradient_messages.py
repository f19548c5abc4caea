"""Gradients that are sent beside the backward pass: the same step, in the same order, and nothing lost in silence."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFAC, SGD, LossScaler
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.optim import gradient_messages
from kfac_dist.optim.averaged import AveragedOptimizer
from kfac_dist.optim.base import DistributedOptimizer
from kfac_dist.optim.gradient_messages import cut_for_backward
from kfac_dist.optim.kfac import CommDtypes


class Background(LocalCommunicator):
    """One rank whose collectives are said to go on by themselves; notes what is started and when it is waited for."""

    in_background = True

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Tensor] = []

    def _start_reduce_scatter_v(self, buffer, counts):
        self.started.append(buffer.clone())
        return super()._start_reduce_scatter_v(buffer, counts)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES", 1)  # a message for each layer
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES_PER_RANK", 0)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def optimizer_of(
    kind: str, net: nn.Module, communicator: LocalCommunicator, **settings: object
) -> DistributedOptimizer:
    if kind == "kfac":
        return KFAC(net, communicator, lr=0.05, damping=0.1, refresh=2, **settings)  # type: ignore[arg-type]
    return SGD(net, communicator, lr=0.05, momentum=0.9, **settings)  # type: ignore[arg-type]


def loss_of(net: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return F.cross_entropy(net(x), torch.randint(3, (8,), generator=generator))


def assert_close_weights(net: nn.Module, expected: nn.Module) -> None:
    for value, reference in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("numels", "at_least", "expected"),
    [
        ([1, 1, 1], 1, [range(2, 3), range(1, 2), range(1)]),
        ([5, 1, 1, 1], 2, [range(2, 4), range(2)]),
        ([1, 1, 5], 3, [range(2, 3), range(2)]),
        ([1, 1], 100, [range(2)]),
        ([], 1, [range(0)]),
        ([0, 0], 1, [range(2)]),
    ],
)
def test_messages_go_from_the_last_layer_to_the_first(numels, at_least, expected, monkeypatch):
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES", at_least)
    assert cut_for_backward(numels, 1, in_background=True) == expected
    assert cut_for_backward(numels, 1, in_background=False) == [range(len(numels))]


def test_more_ranks_have_fewer_messages(monkeypatch):
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES_PER_RANK", 2)
    cuts = [len(cut_for_backward([1] * 12, num_ranks, in_background=True)) for num_ranks in (1, 2, 3, 6, 12)]
    assert cuts == [6, 3, 2, 1, 1]


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.1}], ids=["plain", "clipped"])
def test_the_steps_are_the_same(kind, settings):
    plain, overlapped = network(), network()
    one = optimizer_of(kind, plain, LocalCommunicator(), **settings)
    two = optimizer_of(kind, overlapped, Background(), **settings)
    for step in range(5):
        one.zero_grad()
        two.zero_grad()
        loss_of(plain, step).backward()
        (loss_of(overlapped, step) / 2).backward()  # of two micro-batches only the last is sent meanwhile
        with two.overlap_backward():
            (loss_of(overlapped, step) / 2).backward()
        one.step()
        two.step()
    assert_close_weights(overlapped, plain)


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_messages_are_sent_within_the_backward_pass_and_in_its_order(kind):
    net, communicator = network(), Background()
    optimizer = optimizer_of(kind, net, communicator)
    seen: list[int] = []
    for layer in net[1], net[3]:
        layer.register_full_backward_hook(lambda *_: seen.append(len(communicator.started)))
    communicator.started.clear()
    with optimizer.overlap_backward():
        loss_of(net, 0).backward()
        assert len(communicator.started) == (3 if kind == "kfac" else 6), "all before the context ends"
    assert seen[1] > seen[0] > 0, "the later layers' while the earlier ones' are computed"
    last = net[4].weight.grad
    assert last is not None
    parts = communicator.started[0] if kind == "kfac" else torch.cat(communicator.started[:2])
    assert {round(float(v), 9) for v in last.flatten()} <= {round(float(v), 9) for v in parts}
    before = len(communicator.started)
    optimizer.step()
    further = len(communicator.started) - before
    assert further == (1 if kind == "kfac" else 0), "the factors' message only"


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_a_message_waits_for_those_before_it(kind):
    """Else ranks whose passes leave out different layers would send in different orders."""
    net, communicator = network(), Background()
    optimizer = optimizer_of(kind, net, communicator)
    communicator.started.clear()
    with optimizer.overlap_backward():
        net[2](net[1](net[0](torch.ones(2, 6, dtype=torch.float64)))).sum().backward()  # not the last layer
        assert not communicator.started
    assert len(communicator.started) == (3 if kind == "kfac" else 6)
    assert not communicator.started[0].any()
    optimizer.step()
    assert net[4].weight.grad is None


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_without_a_pass_all_is_sent_at_the_end(kind):
    """A rank that has nothing to add must still take part."""
    net, communicator = network(), Background()
    optimizer = optimizer_of(kind, net, communicator)
    loss_of(net, 0).backward()
    communicator.started.clear()
    with optimizer.overlap_backward():
        pass
    assert len(communicator.started) == (3 if kind == "kfac" else 6)
    assert communicator.started[0].any()


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
@pytest.mark.parametrize("change", ["in place", "replaced", "dropped", "clipped"])
def test_gradients_that_are_changed_afterwards_are_refused(kind, change):
    net = network()
    optimizer = optimizer_of(kind, net, Background())
    with optimizer.overlap_backward():
        loss_of(net, 0).backward()
    weight = net[2].weight
    assert weight.grad is not None
    if change == "in place":
        weight.grad.mul_(2)
    elif change == "replaced":
        weight.grad = weight.grad * 2
    elif change == "dropped":
        weight.grad = None
    else:
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match=r"(2|4)\.(weight|bias) was changed after overlap_backward.*max_grad_norm"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    optimizer.zero_grad()
    loss_of(net, 0).backward()
    optimizer.step()
    assert not any(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_only_one_pass_for_each_step(kind):
    net = network()
    optimizer = optimizer_of(kind, net, Background())
    with optimizer.overlap_backward():
        loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="entered again before step"), optimizer.overlap_backward():
        loss_of(net, 1).backward()
    optimizer.zero_grad()
    with optimizer.overlap_backward():
        loss_of(net, 1).backward()
        with pytest.raises(RuntimeError, match=r"4\.(weight|bias) came after the first had been sent"):
            loss_of(net, 1).backward()
    with pytest.raises(RuntimeError, match="was changed after"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_gradients_that_the_model_dropped_are_no_earlier_pass(kind):
    """As after a NaN that all ranks saw; the next pass begins anew."""
    net = network()
    optimizer = optimizer_of(kind, net, Background())
    for _ in range(2):
        with optimizer.overlap_backward():
            loss_of(net, 0).backward()
        net.zero_grad()
    fresh = network()
    other = optimizer_of(kind, fresh, LocalCommunicator())
    for model, used in ((net, optimizer), (fresh, other)):
        with used.overlap_backward():
            loss_of(model, 1).backward()
        used.step()
    assert_close_weights(net, fresh)


def test_two_optimizers_do_not_send_at_once():
    """Defect: ranks whose passes differ sent the two's messages in other orders, and mixed them up."""
    net, communicator = network(), Background()
    trunk = SGD(net, communicator, list(net[0].parameters()), lr=0.1)
    head = SGD(net, communicator, list(net[4].parameters()), lr=0.1)
    with (
        pytest.raises(RuntimeError, match="within another optimizer's"),
        trunk.overlap_backward(),
        head.overlap_backward(),
    ):
        loss_of(net, 0).backward()
    for optimizer in (trunk, head):  # one behind the other is fine
        optimizer.zero_grad()
        with optimizer.overlap_backward():
            loss_of(net, 0).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_an_exception_in_the_pass_leaves_no_rank_waiting(kind):
    """Defect: this rank had sent less than the others."""
    net, communicator = network(), Background()
    optimizer = optimizer_of(kind, net, communicator)
    net[0].register_full_backward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    communicator.started.clear()
    with pytest.raises(ZeroDivisionError), optimizer.overlap_backward():
        loss_of(net, 0).backward()
    assert len(communicator.started) == (3 if kind == "kfac" else 6)
    assert not communicator.is_overlapping
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer.report.skipped


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_a_step_that_failed_leaves_nothing_behind(kind, monkeypatch):
    """Defect: without any overlap every later step said that gradients had been changed after they were sent."""
    net = network()
    optimizer = optimizer_of(kind, net, LocalCommunicator())
    loss_of(net, 0).backward()
    with monkeypatch.context() as patch:
        patch.setattr(gradient_messages.GradientMessages, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    net.zero_grad()
    loss_of(net, 1).backward()
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_a_step_within_is_refused(kind):
    net = network()
    optimizer = optimizer_of(kind, net, Background())
    with optimizer.overlap_backward():
        loss_of(net, 0).backward()
        with pytest.raises(RuntimeError, match=r"step\(\) was called within overlap_backward"):
            optimizer.step()


def test_a_layer_that_reentrant_checkpointing_runs_twice():
    """Its gradient comes in two parts, and the message with the first may be gone."""
    net = network()
    shared = nn.Linear(6, 6).double()
    whole = nn.ModuleDict({"net": net, "shared": shared})
    optimizer = SGD(whole, Background(), lr=0.1)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    hidden = checkpoint(shared, checkpoint(shared, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"shared\.(weight|bias) came after"), optimizer.overlap_backward():
        F.cross_entropy(net(hidden), torch.zeros(4, dtype=torch.int64)).backward()


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_skipping_and_zeroing_forget_what_was_sent(kind):
    net, communicator = network(), Background()
    optimizer = optimizer_of(kind, net, communicator)
    before = [parameter.clone() for parameter in net.parameters()]
    with optimizer.overlap_backward():
        loss_of(net, 0).backward()
    optimizer.skip_step()
    assert all(map(torch.equal, net.parameters(), before))
    optimizer.zero_grad()
    communicator.started.clear()
    loss_of(net, 1).backward()
    optimizer.step()
    fresh = network()
    other = optimizer_of(kind, fresh, LocalCommunicator())
    loss_of(fresh, 1).backward()
    other.step()
    assert_close_weights(net, fresh)


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_what_is_frozen_between_the_pass_and_the_step(kind):
    plain, overlapped = network(), network()
    one = optimizer_of(kind, plain, LocalCommunicator())
    two = optimizer_of(kind, overlapped, Background())
    for step in range(2):
        for net, optimizer in ((plain, one), (overlapped, two)):
            optimizer.zero_grad()
            if net is plain:
                loss_of(net, step).backward()
            else:
                with optimizer.overlap_backward():
                    loss_of(net, step).backward()
            net[2].requires_grad_(step == 1)
            optimizer.step()
    assert_close_weights(overlapped, plain)


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
@pytest.mark.parametrize("comm_dtype", [None, torch.float16, torch.bfloat16])
def test_an_overflow_that_was_sent_is_found(kind, comm_dtype):
    net, scaler = network(), LossScaler(scale=2.0)
    if kind == "kfac":
        settings: dict[str, object] = {"comm_dtypes": CommDtypes(gradients=comm_dtype)}
    else:
        settings = {"gradient_comm_dtype": comm_dtype}
    optimizer = optimizer_of(kind, net, Background(), loss_scaler=scaler, **settings)
    before = [parameter.clone() for parameter in net.parameters()]
    with optimizer.overlap_backward():
        (scaler.scale_loss(loss_of(net, 0)) * float("inf")).backward()
    optimizer.step()
    assert optimizer.report.skipped
    assert scaler.num_overflows == 1
    assert all(map(torch.equal, net.parameters(), before))
    optimizer.zero_grad()
    with optimizer.overlap_backward():
        scaler.scale_loss(loss_of(net, 0)).backward()
    optimizer.step()
    assert not optimizer.report.skipped
    assert not any(map(torch.equal, net.parameters(), before))


def test_a_state_that_is_loaded_lays_the_messages_out_anew():
    source, net = network(), network()
    first = optimizer_of("kfac", source, Background())
    second = optimizer_of("kfac", net, Background())
    for step in range(3):
        for model, optimizer in ((source, first), (net, second)):
            optimizer.zero_grad()
            with optimizer.overlap_backward():
                loss_of(model, step).backward()
            optimizer.step()
        second.load_state_dict(first.state_dict())
        net.load_state_dict(source.state_dict())
    for value, expected in zip(net.parameters(), source.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_hooks_go_with_the_optimizer_and_not_with_copies(kind):
    net = network()
    optimizer = optimizer_of(kind, net, Background())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        loss_of(twin, 0).backward()
    optimizer.close()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.overlap_backward()
    optimizer = optimizer_of(kind, net, Background())
    assert all(parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    del optimizer
    gc.collect()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_no_hooks_where_nothing_goes_on_in_the_background():
    net = network()
    optimizer = SGD(net, LocalCommunicator(), lr=0.1)
    assert isinstance(optimizer, AveragedOptimizer)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    for _ in range(2):
        with optimizer.overlap_backward():
            loss_of(net, 0).backward()

"""What users do beside training that the capture must bear, or refuse by name: hooks, attacks, transforms, tracing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.unit.curvature.layer_factors import random
from tests.unit.curvature.recorder import Recorder, assert_same, batch, seeded, small_cnn

# Others' hooks and passes that are no training


def replace_output(layer, inputs, output):
    return 3 * torch.relu(output)


def test_a_hook_that_replaces_the_output_may_be_older_or_younger():
    x, y = batch()
    recorders = []
    for order in ("module", "before", "after"):
        model = small_cnn(inplace=False)
        if order == "before":
            model[0].register_forward_hook(replace_output)
        recorders.append(Recorder(model))
        if order == "after":
            model[0].register_forward_hook(replace_output)
        hidden = model[0](x)
        hidden = replace_output(model[0], (x,), hidden) if order == "module" else hidden
        F.cross_entropy(model[1:](hidden), y).backward()
    assert_same(recorders[1], recorders[0])
    assert_same(recorders[2], recorders[0])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of torch before 2.12 or so
@pytest.mark.parametrize("order", ["tensor", "layer before", "layer after"])
def test_a_hook_that_changes_the_gradient_of_a_layers_output_counts(order):
    """Defect: G was that of the gradient before hooks of `Tensor.register_hook`, the weight's gradient that after."""

    class Halve(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.view_as(x))
        backward = staticmethod(lambda ctx, g: g / 2)

    x, y = batch()
    model = small_cnn(inplace=False)
    expected = Recorder(model)
    F.cross_entropy(model[1:](Halve.apply(model[0](x))), y).backward()
    expected.capture.close()
    if order == "layer before":
        model[0].register_full_backward_pre_hook(lambda layer, gradients: (gradients[0] / 2,))
    recorder = Recorder(model)
    if order == "layer after":
        model[0].register_full_backward_pre_hook(lambda layer, gradients: (gradients[0] / 2,))
    hidden = model[0](x)
    if order == "tensor":
        hidden.register_hook(lambda g: g / 2)
    F.cross_entropy(model[1:](hidden), y).backward()
    assert_same(recorder, expected)


def attack(way, loss, x, weights):
    """A backward pass that computes the input's gradient and no weight's."""
    if way == "grad":
        torch.autograd.grad(loss, x)
    elif way == "retained":
        torch.autograd.grad(loss, x, retain_graph=True)
    else:
        loss.backward(inputs=[x])
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("way", ["grad", "retained", "backward"])
def test_a_gradient_for_the_input_only_is_no_backward_pass(way, checkpointed, autocast):
    x, y = batch()
    x.requires_grad_()
    model = small_cnn()
    model = model.float() if autocast else model

    def loss_of(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = checkpoint(model[:5], x, use_reentrant=False) if checkpointed else model[:5](x)
            return F.cross_entropy(model[5:](hidden), y)

    x = x.detach().to(model[0].weight.dtype).requires_grad_()
    plain = Recorder(model)
    loss_of(x).backward()
    plain.capture.close()
    for parameter in model.parameters():
        parameter.grad = None

    attacked = Recorder(model)
    loss = loss_of(x)
    attack(way, loss, x, model.parameters())
    assert attacked.is_untouched()
    (loss if way == "retained" else loss_of(x)).backward()
    assert attacked.capture.num_passes == 1
    assert_same(attacked, plain)


def test_without_the_private_function_every_backward_pass_counts(monkeypatch):
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    x, y = batch()
    model = small_cnn()
    recorder = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    assert recorder.capture.num_passes == 1
    assert len(recorder.capture.captured) == 4


@pytest.mark.parametrize("wanted", ["parameters", "parameters and input"])
def test_autograd_grad_for_the_weights_counts_as_a_backward_pass(wanted):
    x, y = batch()
    x.requires_grad_()
    model = small_cnn()
    plain = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    plain.capture.close()
    again = Recorder(model)
    tensors = [*model.parameters()] if wanted == "parameters" else [*model.parameters(), x]
    torch.autograd.grad(F.cross_entropy(model(x), y), tensors)
    assert_same(again, plain)


def test_a_gradient_penalty_is_refused():
    x, y = batch()
    x.requires_grad_()
    model = small_cnn(inplace=False)
    recorder = Recorder(model)
    loss = F.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward pass .*gradient penalty.* skip"):
        (loss + gradient.square().sum()).backward()
    assert recorder.capture.num_passes == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the forward of the outer checkpoint
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_used_twice_under_checkpointing_counts_one_pass(use_reentrant, nested):
    def run(recorder_for, checkpointed):
        model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)))
        recorder = recorder_for(model)

        def segment(x, depth=int(nested)):
            x = torch.tanh(model[1](x))
            if depth == 0:
                return x
            return checkpoint(segment, x, 0, use_reentrant=use_reentrant) if checkpointed else segment(x, 0)

        for seed in range(2):
            hidden = model[0](random(5, 3, seed=seed))
            for _ in range(2):
                hidden = checkpoint(segment, hidden, use_reentrant=use_reentrant) if checkpointed else segment(hidden)
            (F.cross_entropy(model[2](hidden), torch.tensor([0, 1, 0, 1, 1])) / 2).backward()
        assert recorder.capture.num_passes == 2
        return recorder

    assert_same(run(Recorder, True), run(Recorder, False))


def test_a_pass_counts_where_it_reaches_nothing_that_is_due():
    """A head for each of two micro-batches. Defect: G and A were scaled as if there had been one pass."""
    recorders = []
    for due in (("trunk", "first", "second"), ("first", "second")):
        model = seeded(nn.ModuleDict({"trunk": nn.Linear(3, 4), "first": nn.Linear(4, 2), "second": nn.Linear(4, 2)}))
        recorder = Recorder(model)
        recorder.raw = {key: values for key, values in recorder.raw.items() if key[0] in due}
        recorder.capture.begin(recorder.raw)
        for seed, head in enumerate(("first", "second")):
            loss = F.cross_entropy(model[head](model["trunk"](random(5, 3, seed=seed))), torch.tensor([0, 1, 0, 1, 1]))
            (loss / 2).backward()
        assert recorder.capture.num_passes == 2
        recorders.append(recorder)
    del recorders[0].raw["trunk", "A"], recorders[0].raw["trunk", "G"]
    recorders[0].capture.move(recorders[0].raw)
    assert_same(*recorders)


def test_num_samples_is_that_of_the_forward():
    def run(forwards_first):
        model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        recorder = Recorder(model)
        losses = []
        for seed, num_samples in enumerate((3, 6)):
            recorder.capture.num_samples = num_samples
            losses.append(F.cross_entropy(model(random(6, 3, seed=seed)), torch.tensor([0, 1, 0, 1, 1, 0])) / 2)
            if not forwards_first:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        return recorder

    assert_same(run(True), run(False))


# Transforms, tracing, scripting


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # jvp uses TorchScript
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev", "jvp", "vmap", "hessian"])
def test_functional_transforms_work_and_are_not_captured(transform):
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = random(5, 3), torch.tensor([0, 1, 0, 1, 1])
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    def run():
        if transform == "grad":
            return list(torch.func.grad(loss)(weights, x, y).values())
        if transform == "vmap of grad":
            return list(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y).values())
        if transform == "jacrev":
            return [torch.func.jacrev(model)(x[0])]
        if transform == "jvp":
            return list(torch.func.jvp(model, (x,), (x,)))
        if transform == "vmap":
            return [torch.func.vmap(model)(x)]
        return [torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x[0])]

    expected = run()
    recorder = Recorder(model)
    for actual, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, value)
    assert recorder.is_untouched()
    F.cross_entropy(model(x), y).backward()
    assert recorder.capture.num_passes == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TorchScript itself
def test_a_model_is_traced_without_its_hooks():
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    recorder = Recorder(model)
    x = random(5, 3)
    traced = torch.jit.trace(model, x)
    traced(x).sum().backward()
    assert recorder.is_untouched()
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TorchScript itself
def test_scripting_is_refused_by_name_until_the_hooks_are_off():
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    recorder = Recorder(model)
    with pytest.raises(AttributeError, match=r"torch\.jit\.script .* layer 0: .* close\(\)"):
        torch.jit.script(model)
    recorder.capture.close()
    x = random(5, 3)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))

"""The factors that hooks capture, against recorded activations and an independent library."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_dist.curvature.batchnorm import batchnorm_fisher
from tests.unit.curvature.layer_factors import (
    conv2d_input_factor,
    conv2d_output_factor,
    linear_input_factor,
    linear_output_factor,
    random,
)
from tests.unit.curvature.recorder import TOLERANCE, Recorder, assert_same, batch, seeded, small_cnn

# An independent oracle


def positions_of_layers(model, x):
    """Output positions T of each Linear and Conv2d layer, by name."""
    positions = {}
    for name, layer in model.named_children():
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            positions[name] = x.shape[2] * x.shape[3]
        elif isinstance(layer, nn.Linear):
            positions[name] = 1
    return positions


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of its dependencies
@pytest.mark.parametrize("num_batches", [1, 3])
def test_factors_agree_with_curvlinops(num_batches):
    """curvlinops, "empirical" Fisher with the "expand" approximation, for a mean loss over all N samples.

    It shares out the 1/T of the T positions differently: its A is (1/(N T)) Σ Σ a aᵀ and its G is
    (1/N) Σ Σ (N g)(N g)ᵀ, after Eschenhagen et al. 2023, where ours, after Grosse and Martens 2016, have 1/N
    and 1/(N T). So A = T · theirs, G = theirs / T, and the Kronecker products are the same. Several batches
    are micro-batches here, whose mean losses are divided by their number.
    """
    from curvlinops import KFACLinearOperator

    model = small_cnn(inplace=False)
    batches = [batch(4, seed) for seed in range(num_batches)]
    positions = positions_of_layers(model, batches[0][0])
    recorder = Recorder(model)
    for x, y in batches:
        (F.cross_entropy(model(x), y) / num_batches).backward()
    recorder.capture.close()

    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        batches,
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    theirs = operator.state_dict()
    start = 0
    assert sorted(positions.values()) == [1, 1, 8, 24]
    for name, num_positions in positions.items():
        A, G = recorder.matrix(name, "A")[0], recorder.matrix(name, "G")[0]
        torch.testing.assert_close(A, num_positions * theirs["input_covariances"][name], **TOLERANCE)
        torch.testing.assert_close(G, theirs["gradient_covariances"][name] / num_positions, **TOLERANCE)

        # Their parameters stand one behind the other: the weight row-major, then the bias.
        layer = model.get_submodule(name)
        indices = torch.arange(layer.weight.numel()).view(len(G), -1)
        if layer.bias is not None:
            indices = torch.cat([indices, layer.weight.numel() + torch.arange(len(G))[:, None]], dim=1)
        indices = start + indices.flatten()
        torch.testing.assert_close(dense[indices[:, None], indices], torch.kron(G, A), **TOLERANCE)
        start += len(indices)
    assert start == len(dense)


# What is captured


class Network(nn.Module):
    """Convolution, BatchNorm, in-place activation and a residual sum, as in a ResNet."""

    def __init__(self, inplace):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x):
        self.conv_input, self.conv_output = x, self.conv(x)
        self.norm_input = self.conv_output
        self.norm_output = self.norm(self.norm_input)
        hidden = F.relu(self.norm_output, inplace=self.inplace)
        self.second_input, self.second_output = hidden, self.second(hidden)
        if self.inplace:
            summed = self.second_output.clone().add_(hidden).relu_()
        else:
            summed = F.relu(self.second_output + hidden)
        self.last_input = summed.mean(dim=(2, 3))
        self.last_output = self.last(self.last_input)
        return self.last_output


@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
def test_captured_matrices_are_those_of_the_recorded_tensors(form):
    model = seeded(Network(inplace=False))
    recorder = Recorder(model, form)
    x, y = batch()
    output = model(x)
    for tensor in (model.conv_output, model.norm_output, model.second_output, model.last_output):
        tensor.retain_grad()
    F.cross_entropy(output, y).backward()

    assert recorder.capture.captured == {"conv", "norm", "second", "last"}
    pointwise = ((1, 1), (1, 1), (0, 0), (1, 1), 1, True)
    expected = {
        ("conv", "A"): conv2d_input_factor(x, (3, 3), (1, 1), (1, 1), (1, 1), 2, True),
        ("conv", "G"): conv2d_output_factor(model.conv_output.grad, 2),
        ("norm", "F"): batchnorm_fisher(model.norm_input.detach(), model.norm_output.grad, model.norm.eps, form),
        ("second", "A"): conv2d_input_factor(model.second_input.detach(), *pointwise),
        ("second", "G"): conv2d_output_factor(model.second_output.grad, 1),
        ("last", "A"): linear_input_factor(model.last_input.detach(), True),
        ("last", "G"): linear_output_factor(model.last_output.grad),
    }
    assert recorder.packed.keys() == expected.keys()
    for key, matrices in expected.items():
        torch.testing.assert_close(recorder.matrix(*key), matrices, **TOLERANCE)


def test_in_place_activations_change_nothing():
    x, y = batch()
    recorders = []
    for inplace in (False, True):
        model = seeded(Network(inplace))
        recorders.append(Recorder(model))
        F.cross_entropy(model(x), y).backward()
    assert_same(*recorders)


def test_capture_leaves_the_gradients_as_they_are():
    x, y = batch()
    plain, hooked = seeded(Network(inplace=True)), seeded(Network(inplace=True))
    recorder = Recorder(hooked)  # hooks go with it
    for model in (plain, hooked):
        F.cross_entropy(model(x), y).backward()
    for one, other in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert recorder.capture.captured


def test_channels_last_gives_the_same_factors():
    x, y = batch()
    recorders = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = seeded(Network(inplace=True)).to(memory_format=memory_format)
        recorders.append(Recorder(model))
        F.cross_entropy(model(x.contiguous(memory_format=memory_format)), y).backward()
    assert_same(*recorders)


def test_nothing_is_captured_without_training_or_a_backward():
    model = seeded(Network(inplace=True))
    recorder = Recorder(model)
    x, y = batch()
    model.eval()
    F.cross_entropy(model(x), y).backward()
    model.train()
    with torch.no_grad():
        model(x)
    model(x)  # a forward that nobody differentiates
    assert recorder.is_untouched()

    F.cross_entropy(model(x), y).backward()
    recorder.capture.close()
    fresh = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    assert_same(recorder, fresh)


def test_a_frozen_batchnorm_in_eval_mode_is_left_out_alone():
    model = seeded(Network(inplace=True))
    recorder = Recorder(model)
    model.norm.eval()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    assert recorder.capture.captured == {"conv", "second", "last"}
    assert recorder.packed["norm", "F"].isnan().all()


def test_only_wanted_matrices_are_built_and_none_after_removal():
    model = small_cnn()
    recorder = Recorder(model, only=["G"])
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    assert {matrix for _, matrix in recorder.packed} == {"G"}
    assert not any(value.isnan().any() for value in recorder.packed.values())

    recorder = Recorder(model)
    recorder.capture.close()
    F.cross_entropy(model(x), y).backward()
    assert recorder.is_untouched()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once(use_reentrant):
    x, y = batch()
    x.requires_grad_()  # the reentrant kind needs it
    model = small_cnn()
    plain = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    plain.capture.close()
    again = Recorder(model)
    hidden = checkpoint(model[:5], x, use_reentrant=use_reentrant)
    F.cross_entropy(model[5:](hidden), y).backward()
    assert_same(again, plain)


# Accumulation


@pytest.mark.parametrize("num_batches", [2, 3])
def test_micro_batches_equal_one_batch(num_batches):
    x, y = batch(6)
    model = small_cnn()
    whole = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    whole.capture.close()
    parts = Recorder(model)
    for part_x, part_y in zip(x.chunk(num_batches), y.chunk(num_batches), strict=True):
        (F.cross_entropy(model(part_x), part_y) / num_batches).backward()
    assert_same(parts, whole)


def test_micro_batches_average_the_batchnorm_fisher():
    model = seeded(Network(inplace=True))
    model.norm.momentum = 0.0
    single = []
    for seed in (1, 2):
        recorder = Recorder(model)
        x, y = batch(4, seed)
        F.cross_entropy(model(x), y).backward()
        recorder.capture.close()
        single.append(recorder)
    both = Recorder(model)
    for seed in (1, 2):
        x, y = batch(4, seed)
        (F.cross_entropy(model(x), y) / 2).backward()
    for key, packed in both.packed.items():
        mean = (single[0].packed[key] + single[1].packed[key]) / 2
        torch.testing.assert_close(packed, mean, **TOLERANCE)


def test_begin_starts_anew():
    model = small_cnn()
    recorder = Recorder(model)
    for seed in (1, 2):
        recorder.capture.begin(recorder.raw)
        assert recorder.capture.captured == set()
        x, y = batch(4, seed)
        F.cross_entropy(model(x), y).backward()
    recorder.capture.close()
    fresh = Recorder(model)
    F.cross_entropy(model(x), y).backward()
    assert_same(recorder, fresh)


def test_loss_scaling_is_taken_out_again():
    x, y = batch()
    recorders = []
    for scale in (1.0, 1024.0):
        model = seeded(Network(inplace=True))
        recorders.append(Recorder(model, loss_scale=scale))
        (scale * F.cross_entropy(model(x), y)).backward()
    assert_same(*recorders)


# A layer used twice: its calls are further positions of the same layer


def test_a_linear_layer_used_twice_sees_both_calls_as_positions():
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    recorder = Recorder(model)
    x = random(5, 3)
    first = model[0](x)
    second_input = torch.tanh(first)
    second = model[0](second_input)
    first.retain_grad()
    second.retain_grad()
    F.cross_entropy(model[1](second), torch.tensor([0, 1, 0, 1, 1])).backward()
    inputs, gradients = torch.stack([x, second_input], dim=1), torch.stack([first.grad, second.grad], dim=1)
    torch.testing.assert_close(recorder.matrix("0", "A"), linear_input_factor(inputs.detach(), True), **TOLERANCE)
    torch.testing.assert_close(recorder.matrix("0", "G"), linear_output_factor(gradients), **TOLERANCE)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_convolution_used_at_two_sizes_weights_its_positions_alike(accumulation_steps):
    model = seeded(nn.Sequential(nn.Conv2d(2, 2, 3)))
    recorder = Recorder(model)
    total = {"A": 0, "G": 0}
    num_samples = 4
    for step in range(accumulation_steps):
        x = random(num_samples, 2, 6, 7, seed=step)
        first = model[0](x)  # 4 × 5 = 20 positions
        second_input = torch.relu(first)
        second = model[0](second_input)  # 2 × 3 = 6 positions
        first.retain_grad()
        second.retain_grad()
        (second.square().flatten(1).sum(dim=1).mean() / accumulation_steps).backward()
        for tensor, gradient in ((x, first.grad), (second_input.detach(), second.grad)):
            patches = F.unfold(tensor, 3).mT
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1).flatten(0, 1)
            rows = (num_samples * accumulation_steps * gradient).flatten(2).mT.flatten(0, 1)
            total["A"] = total["A"] + patches.T @ patches
            total["G"] = total["G"] + rows.T @ rows
    all_samples = num_samples * accumulation_steps
    torch.testing.assert_close(recorder.matrix("0", "A")[0], total["A"] / all_samples, **TOLERANCE)
    torch.testing.assert_close(recorder.matrix("0", "G")[0], total["G"] / (all_samples * 26), **TOLERANCE)


# A part of the samples


@pytest.mark.parametrize(("fraction", "num_used"), [(0.5, 4), (0.3, 3), (0.25, 2), (1e-9, 1), (1e-12, 1), (1.0, 8)])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_factors_of_a_part_are_those_of_its_samples(fraction, num_used, accumulation_steps):
    """Without BatchNorm a sample's gradient is its own, so that a batch of these samples alone has the same factors."""
    model, alone = small_cnn(), small_cnn()
    recorder, expected = Recorder(model), Recorder(alone)
    recorder.capture.sample_fraction = fraction
    for seed in range(accumulation_steps):
        x, y = batch(8, seed)
        (F.cross_entropy(model(x), y) / accumulation_steps).backward()
        (F.cross_entropy(alone(x[:num_used]), y[:num_used]) / accumulation_steps).backward()
    assert_same(recorder, expected)


def test_samples_are_a_part_only_where_they_lie_in_the_first_dimension():
    x = random(6, 4, 3)
    for num_samples, shape in ((4, (6, 4, 3)), (None, (3,))):
        model, whole = seeded(nn.Sequential(nn.Linear(3, 2))), seeded(nn.Sequential(nn.Linear(3, 2)))
        recorder, expected = Recorder(model), Recorder(whole)
        recorder.capture.sample_fraction = 0.5
        recorder.capture.num_samples = expected.capture.num_samples = num_samples
        for net in (model, whole):
            net(x.flatten()[: math.prod(shape)].view(shape)).square().mean().backward()
        assert_same(recorder, expected)


def test_batchnorm_takes_all_samples():
    model, whole = (seeded(nn.Sequential(nn.BatchNorm2d(2))) for _ in range(2))
    recorder, expected = Recorder(model), Recorder(whole)
    recorder.capture.sample_fraction = 0.5
    for net in (model, whole):
        net(random(6, 2, 3, 3)).pow(3).mean().backward()
    assert_same(recorder, expected)

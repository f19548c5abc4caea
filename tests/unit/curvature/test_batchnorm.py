"""The BatchNorm Fisher against per-sample gradients from autograd.

j_n is one sample's own gradient of [gamma, beta] with the batch's statistics held fixed. Autograd gives it
when every sample gets a gamma and a beta of its own: the mean loss then has the gradient j_n / N there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.curvature import batchnorm
from kfac_dist.curvature.batchnorm import (
    batchnorm_fisher,
    join_gradient,
    sample_gradients,
    split_gradient,
    stack_shape,
)
from tests.unit.curvature.layer_factors import random

SHAPES = [(6, 3, 4, 5), (6, 3, 7), (6, 3), (2, 1, 1, 1)]
FORMS = ["full", "unit", "diagonal"]
EPS = 1e-2  # large enough that leaving it out shows


def mean_loss(output, seed=7):
    """A loss that is a mean of per-sample losses and depends on every value in its own way."""
    weight = random(*output.shape, seed=seed)
    return (torch.tanh(output + weight) * weight).flatten(1).sum(dim=1).mean()


def layer_input(shape):
    return 2.0 * random(*shape) + 0.7


def gradients_by_autograd(x, gamma, beta):
    """Per-sample j (N, 2C), and g at the layer's output."""
    num_samples, channels = x.shape[:2]
    trailing = [1] * (x.dim() - 2)
    h = F.batch_norm(x, None, None, training=True, eps=EPS)
    own_gamma = gamma.expand(num_samples, -1).clone().requires_grad_()
    own_beta = beta.expand(num_samples, -1).clone().requires_grad_()
    view = (num_samples, channels, *trailing)
    output = h * own_gamma.view(view) + own_beta.view(view)
    output.retain_grad()
    mean_loss(output).backward()
    return num_samples * torch.cat([own_gamma.grad, own_beta.grad], dim=1), output.grad


def gammas(channels):
    gamma = random(channels, seed=1)
    gamma[0] = 0.0  # zero-initialised scales are common
    return [gamma, torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)]


def dense_blocks(stack, form, channels):
    """Put a stack back into the 2C × 2C matrix, zeros elsewhere."""
    if form == "full":
        return stack[0]
    dense = torch.zeros(2 * channels, 2 * channels, dtype=stack.dtype)
    for index, matrix in enumerate(stack):
        indices = torch.tensor([index, channels + index] if form == "unit" else [index])
        dense[indices[:, None], indices] = matrix
    return dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which_gamma", [0, 1, 2], ids=["gamma partly 0", "gamma 0", "gamma 1"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_per_sample_autograd(shape, which_gamma, form):
    x, channels = layer_input(shape), shape[1]
    j, g = gradients_by_autograd(x, gammas(channels)[which_gamma], random(channels, seed=2))
    full = torch.zeros(2 * channels, 2 * channels, dtype=torch.float64)
    for row in j:
        full += torch.outer(row, row) / len(j)

    fisher = batchnorm_fisher(x, g, EPS, form)
    if form == "full":
        expected = full[None]
    elif form == "diagonal":
        expected = full.diagonal().reshape(-1, 1, 1)
    else:
        pairs = [torch.tensor([channel, channels + channel]) for channel in range(channels)]
        expected = torch.stack([full[pair[:, None], pair] for pair in pairs])
    assert fisher.shape == expected.shape
    assert fisher.shape[:2] == stack_shape(channels, form)
    torch.testing.assert_close(fisher, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_per_sample_gradients_average_to_the_layers_own_gradient(shape):
    layer_type = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layer = layer_type(shape[1], eps=EPS, dtype=torch.float64)
    layer.weight.data = random(shape[1], seed=1)
    x = layer_input(shape)
    mean_loss(layer(x)).backward()
    j, _ = gradients_by_autograd(x, layer.weight.detach(), layer.bias.detach())
    expected = torch.cat([layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(j.mean(dim=0), expected, rtol=1e-10, atol=1e-13)


def test_numbers_by_hand():
    # One channel, N = 2, T = 2: mean 0, variance 4, eps 0 → h = x / 2.
    x = torch.tensor([[[2.0, -2.0]], [[-2.0, 2.0]]], dtype=torch.float64)
    g = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]], dtype=torch.float64)
    # N Σ g h: 2 (1 − 0) = 2 and 2 (−3 + 2) = −2; N Σ g: 2 and 10.
    expected = torch.tensor([[4.0, -8.0], [-8.0, 52.0]], dtype=torch.float64)
    torch.testing.assert_close(batchnorm_fisher(x, g, 0.0, "full")[0], expected)
    torch.testing.assert_close(batchnorm_fisher(x, g, 0.0, "unit")[0], expected)
    torch.testing.assert_close(batchnorm_fisher(x, g, 0.0, "diagonal").flatten(), expected.diagonal())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 60, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_that_is_cut_into_chunks_gives_the_same(shape, chunk, dtype, one_thread, monkeypatch):
    """Also where the chunks' means and numbers of samples differ."""
    x, g = (
        (layer_input(shape) + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype),
        random(*shape).to(dtype),
    )
    expected = sample_gradients(x.double(), g.double(), EPS)
    monkeypatch.setattr(batchnorm, "_WHOLE_NUMEL", 1)
    monkeypatch.setattr(batchnorm, "_CHUNK_NUMEL", chunk)
    actual = sample_gradients(x, g, EPS)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_large_mean_does_not_cancel_the_variance():
    x, g = layer_input((8, 3, 6, 6)), random(8, 3, 6, 6, seed=3)
    expected = batchnorm_fisher(x, g, EPS, "full")
    shifted = batchnorm_fisher((x + 1000).float(), g.float(), EPS, "full")
    assert shifted.dtype == torch.float32
    torch.testing.assert_close(shifted.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_memory_layout_does_not_matter_and_arguments_stay_as_they_are():
    x, g = layer_input((4, 3, 5, 2)), random(4, 3, 5, 2, seed=3)
    expected = batchnorm_fisher(x, g, EPS, "full")
    x_last, g_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, g))
    copies = x_last.clone(), g_last.clone()
    torch.testing.assert_close(batchnorm_fisher(x_last, g_last, EPS, "full"), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x_last, copies[0])
    assert torch.equal(g_last, copies[1])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_arranged_as_the_matrices_are(form):
    channels = 3
    gradient = torch.arange(6.0, dtype=torch.float64)  # gamma 0 1 2, beta 3 4 5
    vectors = split_gradient(gradient, form)
    expected = {
        "full": [[0, 1, 2, 3, 4, 5]],
        "unit": [[0, 3], [1, 4], [2, 5]],
        "diagonal": [[0], [1], [2], [3], [4], [5]],
    }
    assert vectors.tolist() == expected[form]
    assert torch.equal(join_gradient(vectors, form), gradient)

    x, g = layer_input((8, channels, 4)), random(8, channels, 4, seed=3)
    stack = batchnorm_fisher(x, g, EPS, form) + 0.1 * torch.eye(len(expected[form][0]), dtype=torch.float64)
    solved = join_gradient(torch.linalg.solve(stack, vectors[..., None])[..., 0], form)
    dense = torch.linalg.solve(dense_blocks(stack, form, channels), gradient)
    torch.testing.assert_close(solved, dense, rtol=1e-10, atol=1e-12)

"""Half precision: products of half-precision tensors, summed and kept in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.curvature.batchnorm import batchnorm_fisher
from kfac_dist.curvature.blocks.create import create_blocks
from tests.unit.curvature.layer_factors import conv2d_input_factor, conv2d_output_factor, linear_input_factor

HALVES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


CASES = {
    "linear": (nn.Linear(20, 6), (64, 20), (64, 6)),
    "linear without bias": (nn.Linear(20, 6, bias=False), (16, 3, 20), (16, 3, 6)),
    "3x3": (nn.Conv2d(8, 6, 3, padding=1), (9, 8, 10, 10), (9, 6, 10, 10)),
    "1x1 strided": (nn.Conv2d(8, 6, 1, stride=2), (9, 8, 10, 10), (9, 6, 5, 5)),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2, stride=2), (9, 8, 11, 11), (9, 6, 5, 5)),
    "batchnorm": (nn.BatchNorm2d(8), (9, 8, 10, 10), (9, 8, 10, 10)),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", CASES)
def test_factors_of_half_tensors_equal_those_of_the_same_values_in_float64(name, half):
    """Only the arguments are rounded: the sums keep fp32's digits."""
    layer, input_shape, output_shape = CASES[name]
    x, g = (random(*input_shape) + 0.5).to(half), (random(*output_shape, seed=1) / 64).to(half)
    (block,) = create_blocks(layer, list(layer.parameters()), "full")
    for matrix in block.factor_shapes:
        factor = block.factor(matrix, x, g)
        assert factor.dtype == torch.float32
        error = relative(factor, block.factor(matrix, x.double(), g.double()))
        assert error < 5e-6, f"{matrix}: {error:.1e}"


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", CASES)
def test_factors_differ_from_those_of_unrounded_tensors_by_the_rounding(name, half):
    layer, input_shape, output_shape = CASES[name]
    x, g = random(*input_shape) + 0.5, random(*output_shape, seed=1) / 64
    (block,) = create_blocks(layer, list(layer.parameters()), "diagonal")
    for matrix in block.factor_shapes:
        error = relative(block.factor(matrix, x.to(half), g.to(half)), block.factor(matrix, x, g))
        assert error < 2 * ROUNDING[half], f"{matrix}: {error:.1e}"


def test_sums_beyond_the_range_of_fp16_are_kept():
    rows = torch.full((4096, 4), 100.0, dtype=torch.float16)  # the sum of squares is 4e7, of the values 4e5
    A = linear_input_factor(rows, bias=True) * 4096
    expected = torch.full((5, 5), 4096 * 100.0**2)
    expected[4, :] = expected[:, 4] = 4096 * 100.0
    expected[4, 4] = 4096
    torch.testing.assert_close(A[0], expected, rtol=1e-6, atol=0)


def test_a_long_sum_does_not_stall_at_half_precision():
    """In a bf16 sum, 256 + 1 is 256."""
    rows = torch.ones(100_000, 2, dtype=torch.bfloat16)
    assert torch.equal(linear_input_factor(rows, bias=True), torch.ones(1, 3, 3))


@pytest.mark.parametrize("half", HALVES)
def test_off_the_cpu_half_tensors_are_multiplied_as_they_are_into_fp32(half, monkeypatch):
    """The products that a GPU would run, on a device that computes shapes and types only."""
    calls = []

    def spy_on(product):
        original = getattr(torch, product)

        def spy(first, second, out_dtype=None):
            calls.append((first.dtype, second.dtype, out_dtype))
            return original(first, second, out_dtype=out_dtype)

        monkeypatch.setattr(torch, product, spy)

    spy_on("mm")
    spy_on("bmm")
    for name, (layer, input_shape, output_shape) in CASES.items():
        if name == "batchnorm":
            continue
        (block,) = create_blocks(layer, list(layer.parameters()), "full")
        x = torch.empty(input_shape, dtype=half, device="meta")
        g = torch.empty(output_shape, dtype=half, device="meta")
        for matrix, (count, size) in block.factor_shapes.items():
            factor = block.factor(matrix, x, g)
            assert (factor.shape, factor.dtype) == ((count, size, size), torch.float32)
    assert len(calls) >= 8
    assert set(calls) == {(half, half, torch.float32)}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3)])
def test_channels_last_gives_the_same_factors(kernel_size, groups):
    x, g = random(5, 8, 7, 6).double(), random(5, 4, 7, 6, seed=1).double()
    settings = (kernel_size, (1, 1), tuple(k // 2 for k in kernel_size), (1, 1), groups, True)
    A = conv2d_input_factor(x, *settings)
    G = conv2d_output_factor(g, groups)
    x, g = (tensor.to(memory_format=torch.channels_last) for tensor in (x, g))
    torch.testing.assert_close(conv2d_input_factor(x, *settings), A, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(conv2d_output_factor(g, groups), G, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
def test_the_shortcut_for_1x1_kernels_equals_an_unfolded_input(stride, padding):
    x = random(3, 4, 6, 7).double()
    A = conv2d_input_factor(x, (1, 1), stride, padding, (1, 1), 1, True)
    patches = F.unfold(x, 1, padding=padding, stride=stride)
    rows = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
    expected = torch.einsum("nit, njt -> ij", rows, rows) / len(x)
    torch.testing.assert_close(A[0], expected, rtol=1e-12, atol=1e-12)


def test_the_batchnorm_fisher_of_half_tensors_with_a_large_mean():
    """Half-precision inputs with a mean of many deviations still give fp32's result for these inputs."""
    x, g = (random(16, 3, 8, 8) + 50).bfloat16(), random(16, 3, 8, 8, seed=1).bfloat16()
    fisher = batchnorm_fisher(x, g, 1e-5, "diagonal")
    assert relative(fisher, batchnorm_fisher(x.double(), g.double(), 1e-5, "diagonal")) < 1e-4

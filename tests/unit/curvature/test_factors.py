"""Kronecker factors against explicit loops over samples and positions, written from the definitions.

Legend, as in the module: N samples, T positions, a input (patch), g gradient of the *mean* loss at the
output. vec is row-major: entry (i, j) of a d_out × n weight matrix stands at i·n + j, so that
vec(g aᵀ) = g ⊗ a and the Fisher of vec(weight) is G ⊗ A.
"""

import itertools
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_dist.curvature import factors, patches
from kfac_dist.curvature.blocks.conv2d import Conv2dBlock
from kfac_dist.curvature.chunks import sample_chunks
from kfac_dist.curvature.factors import (
    image_moment_pays,
    input_factor,
    output_factor,
    pixel_moment,
    pixel_rows,
    second_moment,
    sum_dtype,
)
from tests.unit.curvature.layer_factors import (
    conv2d_input_factor,
    conv2d_output_factor,
    linear_input_factor,
    linear_output_factor,
    random,
)

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# The loops that define the factors


def linear_a_by_loop(x, bias):
    """A = (1/N) Σ_n Σ_t a aᵀ."""
    total = 0
    for sample in x:
        for a in sample.reshape(-1, x.shape[-1]):
            if bias:
                a = torch.cat([a, torch.ones(1, dtype=x.dtype)])
            total = total + torch.outer(a, a)
    return total[None] / len(x)


def g_by_loop(g):
    """G = (1/(N T)) Σ_n Σ_t (N g)(N g)ᵀ for g (N, T, d_out)."""
    num_samples, num_positions, _ = g.shape
    total = 0
    for sample in g:
        for position in sample:
            total = total + torch.outer(num_samples * position, num_samples * position)
    return total / (num_samples * num_positions)


def source_index(index, size, mode):
    """Where an index of the padded axis comes from; None where zeros are padded."""
    if 0 <= index < size:
        return index
    return {
        "zeros": lambda: None,
        "circular": lambda: index % size,
        "replicate": lambda: min(max(index, 0), size - 1),
        "reflect": lambda: -index if index < 0 else 2 * (size - 1) - index,
    }[mode]()


def patches_by_loop(layer, x):
    """The layer's patches (N, T, groups, C/groups · kh · kw), one value at a time."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "valid":
        before = after = (0, 0)
    elif layer.padding == "same":
        total = (dh * (kh - 1), dw * (kw - 1))
        before = (total[0] // 2, total[1] // 2)
        after = (total[0] - before[0], total[1] - before[1])
    else:
        before = after = layer.padding
    num_samples, channels, height, width = x.shape
    out_height = (height + before[0] + after[0] - dh * (kh - 1) - 1) // sh + 1
    out_width = (width + before[1] + after[1] - dw * (kw - 1) - 1) // sw + 1
    per_group = channels // layer.groups
    patches = x.new_zeros(num_samples, out_height * out_width, layer.groups, per_group * kh * kw)
    for oh, ow, channel, i, j in itertools.product(
        range(out_height), range(out_width), range(channels), range(kh), range(kw)
    ):
        row = source_index(oh * sh + i * dh - before[0], height, layer.padding_mode)
        column = source_index(ow * sw + j * dw - before[1], width, layer.padding_mode)
        if row is not None and column is not None:
            group, column_of_a = channel // per_group, (channel % per_group * kh + i) * kw + j
            patches[:, oh * out_width + ow, group, column_of_a] = x[:, channel, row, column]
    return patches


def conv_a_by_loop(layer, x):
    patches = patches_by_loop(layer, x)
    if layer.bias is not None:
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
    total = 0
    for sample in patches:
        for position in sample:
            total = total + position[:, :, None] * position[:, None, :]
    return total / len(x)


def conv_a(layer, x):
    return conv2d_input_factor(
        x,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )


# Linear


@pytest.mark.parametrize("bias", [True, False])
def test_one_sample_and_a_linear_layer_give_the_exact_fisher(bias):
    layer = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    x = random(1, 4)
    output = layer(x)
    output.retain_grad()
    F.cross_entropy(output, torch.tensor([2])).backward()
    gradient = layer.weight.grad
    if bias:
        gradient = torch.cat([gradient, layer.bias.grad[:, None]], dim=1)
    vec = gradient.flatten()

    A, G = linear_input_factor(x, bias)[0], linear_output_factor(output.grad)[0]
    torch.testing.assert_close(torch.kron(G, A), torch.outer(vec, vec), rtol=1e-14, atol=0)


def test_factors_do_not_depend_on_how_often_a_sample_is_repeated():
    # The gradient of the mean loss shrinks with N; a G that is not scaled back would, too.
    x, g = random(1, 3), random(1, 2)
    assert_close(linear_input_factor(x.expand(5, -1), True), linear_input_factor(x, True))
    assert_close(linear_output_factor(g.expand(5, -1) / 5), linear_output_factor(g))
    x, g = random(1, 2, 4, 4), random(1, 2, 4, 4)
    arguments = ((3, 3), (1, 1), (1, 1), (1, 1), 1, True)
    assert_close(conv2d_input_factor(x.expand(5, -1, -1, -1), *arguments), conv2d_input_factor(x, *arguments))
    assert_close(conv2d_output_factor(g.expand(5, -1, -1, -1) / 5, 1), conv2d_output_factor(g, 1))


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 2, 2, 3), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_factors_equal_the_loop(shape, bias):
    x = random(*shape)
    assert_close(linear_input_factor(x, bias), linear_a_by_loop(x, bias))
    assert_close(linear_output_factor(x), g_by_loop(x.reshape(len(x), -1, x.shape[-1]))[None])


def test_linear_numbers_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)  # N = T = 2
    expected = torch.tensor([[10.0, 2.0, 4.0], [2.0, 20.0, 6.0], [4.0, 6.0, 4.0]], dtype=torch.float64) / 2
    assert_close(linear_input_factor(x, True)[0], expected)
    # Σ g gᵀ = [[10, 2], [2, 20]], times N² = 4, over N·T = 4
    expected = torch.tensor([[10.0, 2.0], [2.0, 20.0]], dtype=torch.float64)
    assert_close(linear_output_factor(x)[0], expected)


@pytest.mark.parametrize(
    "layout",
    [lambda x: x, lambda x: x.flatten(0, 1), lambda x: x.transpose(0, 1)],
    ids=["(N, T, d)", "(N·T, d)", "(T, N, d)"],
)
def test_the_scaling_asks_for_the_number_of_samples_not_for_the_order_of_rows(layout):
    values = random(5, 4, 3)
    rows = layout(values).reshape(1, -1, 3)
    assert_close(input_factor(second_moment(rows, ones=True), 5), linear_a_by_loop(values, True))
    assert_close(output_factor(second_moment(rows), 5, num_rows=20), g_by_loop(values)[None])


# Conv2d

GEOMETRIES = {
    "3x3": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "3x3, padding 1": {"kernel_size": 3, "padding": 1},
    "3x3, padding 1, stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "rectangular kernel": {"kernel_size": (3, 2)},
    "wide kernel": {"kernel_size": (1, 4)},
    "tall kernel": {"kernel_size": (4, 1)},
    "stride (2, 1)": {"kernel_size": (3, 2), "stride": (2, 1)},
    "stride (1, 3)": {"kernel_size": 2, "stride": (1, 3)},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 4},
    "padding (1, 2)": {"kernel_size": 3, "padding": (1, 2)},
    "padding beyond the kernel": {"kernel_size": 2, "padding": (3, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "same, even kernel, dilation": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation 2": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilation (2, 1), stride (1, 2)": {"kernel_size": (2, 3), "dilation": (2, 1), "stride": (1, 2)},
    "dilation 3, stride 2": {"kernel_size": 3, "dilation": (3, 2), "stride": 2, "padding": 2},
    "groups 2": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "stride": (2, 1)},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": (2, 3), "padding": (1, 2), "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
    "circular, same, even kernel": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "reflect, groups, stride": {
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "reflect",
        "groups": 2,
        "stride": 2,
    },
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch, of its own speed
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("bias", [True, False])
def test_conv_input_factor_equals_the_loop(geometry, bias):
    layer = nn.Conv2d(4, 4, bias=bias, dtype=torch.float64, **geometry)
    x = random(2, 4, 7, 6)
    # The loop's patches are the layer's own: times the weight, they give its output.
    weight = layer.weight.reshape(layer.groups, 4 // layer.groups, -1)
    output = torch.einsum("ntgi, goi -> ngot", patches_by_loop(layer, x), weight).reshape(2, 4, -1)
    if bias:
        output = output + layer.bias[:, None]
    assert_close(output, layer(x).flatten(2))

    assert_close(conv_a(layer, x), conv_a_by_loop(layer, x))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("padding", [1, "same", 2])
def test_images_no_larger_than_the_kernel(height, width, padding):
    layer = nn.Conv2d(2, 2, 3, padding=padding, dtype=torch.float64)
    x = random(3, 2, height, width)
    assert_close(conv_a(layer, x), conv_a_by_loop(layer, x))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_conv_input_factor_equals_unfold_for_any_geometry(data):
    kernel, stride, dilation = (
        data.draw(st.tuples(*[st.integers(1, most)] * 2), label)
        for most, label in ((5, "kernel"), (4, "stride"), (3, "dilation"))
    )
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * 2), "padding")
    height, width = data.draw(st.tuples(*[st.integers(1, 12)] * 2), "size")
    groups = data.draw(st.integers(1, 2), "groups")
    bias = data.draw(st.booleans(), "bias")
    assume(height + 2 * padding[0] > dilation[0] * (kernel[0] - 1))
    assume(width + 2 * padding[1] > dilation[1] * (kernel[1] - 1))
    x = random(2, 2 * groups, height, width)

    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    rows = columns.reshape(2, groups, -1, columns.shape[-1])
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[:, :, :1])], dim=2)
    expected = torch.einsum("ngit, ngjt -> gij", rows, rows) / 2
    assert_close(conv2d_input_factor(x, kernel, stride, padding, dilation, groups, bias), expected)


@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
@pytest.mark.parametrize(
    ("limit", "value", "sizes"),
    [
        ("patches.UNFOLD_NUMEL", 1, [1] * 5),
        ("patches.UNFOLD_NUMEL", 2 * (2 * 8 * 7) * 2, None),  # with the padding
        ("chunks.CACHED_NUMEL", 1, [1] * 5),
        ("chunks.CACHED_NUMEL", 2 * 2 * 6 * 5, [2, 2, 1]),
    ],
)
def test_a_batch_that_is_cut_into_chunks_gives_the_same_factor(kernel, limit, value, sizes, one_thread):
    layer = nn.Conv2d(2, 2, kernel, stride=(1, 2), padding=1, dtype=torch.float64)
    x = random(5, 2, 6, 5)
    whole = conv_a(layer, x)
    sizes = sizes or ([2, 2, 1] if kernel == (3, 2) else [4, 1])  # what is unfolded is as wide as the kernel
    with (
        patch(f"kfac_dist.curvature.{limit}", value),
        patch.object(patches, "sample_chunks", lambda x, sum_numel: sample_chunks(x)),  # however large the sum is
        patch.object(patches, "_moment_of_chunk", wraps=patches._moment_of_chunk) as moment,
    ):
        assert_close(conv_a(layer, x), whole)
    assert [len(call.args[0]) for call in moment.call_args_list] == sizes


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_output_factor_equals_the_loop_in_each_group(groups):
    g = random(3, 4, 2, 5)
    rows = g.flatten(2).mT  # (N, T, d_out)
    size = 4 // groups
    expected = [g_by_loop(rows[..., start : start + size]) for start in range(0, 4, size)]
    assert_close(conv2d_output_factor(g, groups), torch.stack(expected))


def test_a_1x1_convolution_is_a_linear_layer_at_every_pixel():
    x, g = random(3, 4, 2, 5), random(3, 6, 2, 5, seed=1)
    as_linear = x.permute(0, 2, 3, 1)
    assert_close(conv2d_input_factor(x, (1, 1), (1, 1), (0, 0), (1, 1), 1, True), linear_input_factor(as_linear, True))
    assert_close(conv2d_output_factor(g, 1), linear_output_factor(g.permute(0, 2, 3, 1)))


def test_one_sample_with_one_position_gives_the_exact_fisher_of_each_group():
    layer = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    x = random(1, 4, 3, 3)
    output = layer(x)
    output.retain_grad()
    F.cross_entropy(output.flatten(1), torch.tensor([4])).backward()
    gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], dim=1)
    A, G = conv_a(layer, x), conv2d_output_factor(output.grad, 2)
    for group, rows in enumerate(gradient.split(3)):
        vec = rows.flatten()
        assert_close(torch.kron(G[group], A[group]), torch.outer(vec, vec))


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.mT.contiguous().mT],
    ids=["channels last", "transposed"],
)
def test_memory_layout_does_not_matter_and_arguments_stay_as_they_are(layout):
    layer = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=1, groups=2, dtype=torch.float64)
    x = random(2, 4, 6, 5)
    arranged = layout(x)
    assert not arranged.is_contiguous()
    assert_close(conv_a(layer, arranged), conv_a_by_loop(layer, x))
    assert_close(conv2d_output_factor(arranged, 2), conv2d_output_factor(x, 2))
    assert_close(
        linear_input_factor(arranged.permute(0, 2, 3, 1), True),
        linear_a_by_loop(x.permute(0, 2, 3, 1), True),
    )
    assert torch.equal(arranged, x)


def test_factors_are_symmetric_and_fp32_stays_fp32():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    x = random(4, 3, 6, 6).float()
    for factor in (
        conv_a(layer, x),
        conv2d_output_factor(x, 1),
        linear_input_factor(x, True),
        linear_output_factor(x),
    ):
        assert factor.dtype == torch.float32
        torch.testing.assert_close(factor, factor.mT)
    torch.testing.assert_close(conv_a(layer, x).double(), conv_a_by_loop(layer, x.double()), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    channels_last=st.booleans(),
    chunk=st.sampled_from([1, 40, 1 << 20]),
)
def test_products_by_image_or_by_chunk_equal_one_product_of_all_pixels(shape, dtype, channels_last, chunk):
    images = random(*shape, seed=sum(shape)).to(dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    expected = second_moment(pixel_rows(images.to(sum_dtype(images)), 1))
    with (
        patch("kfac_dist.curvature.chunks.CACHED_NUMEL", chunk),
        patch.object(factors, "sample_chunks", lambda x, sum_numel: sample_chunks(x)),  # however large the sum is
    ):
        moment = pixel_moment(images, 1)
    assert moment.dtype == expected.dtype
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(moment, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("shape", "memory_format", "groups", "expected"),
    [
        ((2, 4, 4, 4), torch.contiguous_format, 1, True),
        ((2, 17, 4, 4), torch.contiguous_format, 1, False),  # fewer pixels than channels
        ((2, 4, 4, 4), torch.contiguous_format, 2, False),
        ((2, 4, 4, 4), torch.channels_last, 1, False),
    ],
)
def test_products_by_image_where_pixels_would_have_to_be_copied(shape, memory_format, groups, expected):
    images = random(*shape).contiguous(memory_format=memory_format)
    assert image_moment_pays(images, groups) == expected
    block = Conv2dBlock("", layer := nn.Conv2d(groups, shape[1], 1, groups=groups), list(layer.parameters()))
    with patch("kfac_dist.curvature.factors._image_moment", wraps=factors._image_moment) as by_image:
        assert_close(block.output_moment(images), second_moment(pixel_rows(images, groups)))
    assert by_image.called == expected

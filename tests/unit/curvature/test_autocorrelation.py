"""The fast sum over a 3×3 convolution's patches equals the plain one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_dist.curvature import autocorrelation
from kfac_dist.curvature.blocks.conv2d import Conv2dBlock
from kfac_dist.curvature.chunks import sample_chunks
from kfac_dist.curvature.patches import Patches, patch_moment
from kfac_dist.tensors.packing import pack_symmetric, triangle_numel

# Sums of some thousand products in float64, in two orders.
TOLERANCE = 1e-12
# The same in fp32; a sum in half precision would be off by 1e-3 and more.
FP32_TOLERANCE = 1e-5


def packed(matrix: Tensor) -> Tensor:
    out = matrix.new_empty(triangle_numel(matrix.shape[-1]))
    pack_symmetric(matrix, out=out)
    return out


def close(value: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((value - reference).abs().max()) <= tolerance * float(reference.abs().max())


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
    ones=st.booleans(),
    chunk=st.sampled_from([1, 200, 1 << 20]),
    channels_last=st.booleans(),
)
def test_equals_the_plain_sum(shape: tuple[int, int, int, int], ones: bool, chunk: int, channels_last: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    patches = Patches.of(nn.Conv2d(shape[1], 2, 3, padding=1))
    out = torch.empty(triangle_numel(9 * shape[1] + ones), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfac_dist.curvature.chunks.CACHED_NUMEL", chunk)
        patch.setattr(autocorrelation, "sample_chunks", lambda x, sum_numel: sample_chunks(x))  # of any sum
        autocorrelation.pack_patch_moment(x, ones, 0.25, out)
    close(out, packed(0.25 * patch_moment(x, patches, ones)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    x = (100 * torch.rand(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    out = torch.empty(triangle_numel(36))
    autocorrelation.pack_patch_moment(x, False, 1.0, out)
    assert out.max() > 65_504  # more than fp16 can hold
    close(
        out, packed(patch_moment(x.double(), Patches.of(nn.Conv2d(4, 2, 3, padding=1)), False)).float(), FP32_TOLERANCE
    )


PLAIN = Patches.of(nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        (PLAIN, True),
        (Patches.of(nn.Conv2d(8, 8, 3, padding="same")), True),
        (Patches.of(nn.Conv2d(8, 8, 3)), False),
        (Patches.of(nn.Conv2d(8, 8, 3, padding=(1, 0))), False),
        (Patches.of(nn.Conv2d(8, 8, 3, padding=1, stride=2)), False),
        (Patches.of(nn.Conv2d(8, 8, 3, padding=2, dilation=2)), False),
        (Patches.of(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), False),
        (Patches.of(nn.Conv2d(8, 8, 3, padding=1, groups=2)), False),
        (Patches.of(nn.Conv2d(8, 8, 5, padding=2)), False),
        (Patches.of(nn.Conv2d(8, 8, (3, 1), padding=1)), False),
        (replace(PLAIN, stride=(1, 2)), False),
    ],
)
def test_where_it_is_used(patches: Patches, expected: bool) -> None:
    assert autocorrelation.pays(torch.zeros(2, 8, 5, 5), patches) is expected


def test_one_sample_without_a_batch_dimension() -> None:
    assert autocorrelation.pays(torch.zeros(8, 5, 5), PLAIN)


def test_not_on_a_gpu() -> None:
    """It has not been measured there."""
    assert not autocorrelation.pays(torch.zeros(2, 8, 5, 5, device="meta"), PLAIN)


def test_not_where_convolutions_have_no_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it takes two to three times as long as the plain way."""
    assert not autocorrelation.pays(torch.zeros(2, 8, 5, 5, dtype=torch.float64), PLAIN)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not autocorrelation.pays(torch.zeros(2, 8, 5, 5), PLAIN)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("layer", [{"padding": 1}, {"padding": 1, "stride": 2}])
def test_a_layers_packed_factors(
    layer: dict[str, int], num_samples: int | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pack_factor` is `factor` in packed form, whichever way the layer takes."""
    if "stride" not in layer:
        monkeypatch.setattr(autocorrelation, "pays", lambda x, patches: True)  # also in float64, for the tolerance
    module = nn.Conv2d(8, 5, 3, bias=bias, **layer).double()  # type: ignore[arg-type]
    block = Conv2dBlock("conv", module, list(module.parameters()))
    x = torch.randn(6, 8, 8, 8, dtype=torch.float64)
    g = torch.randn_like(module(x))
    for values, gradients in ((x, g), block.batched(x[0], g[0])):  # a call without a batch dimension is one sample
        for matrix, (_, size) in block.factor_shapes.items():
            out = torch.empty(triangle_numel(size), dtype=torch.float64)
            block.pack_factor(matrix, values, gradients, num_samples, out)
            close(out, packed(block.factor(matrix, values, gradients, num_samples)))

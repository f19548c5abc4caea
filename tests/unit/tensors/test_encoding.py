"""Half precision on the comm_dtype: errors within their bounds, whatever the magnitudes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfac_dist.tensors.encoding import BLOCK, decode, encode, encoded_bytes

COMM_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64)


def through(values: Tensor, comm_dtype: torch.dtype, part_numels: list[int] | None = None) -> Tensor:
    """What arrives; behind another segment, so that nothing depends on lying at the front of its storage."""
    part_numels = part_numels or [len(values)]
    size = encoded_bytes(part_numels, comm_dtype)
    message = torch.full((4 + size,), 0xFF, dtype=torch.uint8)
    encode(values, part_numels, comm_dtype, message[4:])
    out = torch.full_like(values, math.nan)
    decode(message.clone()[4:], part_numels, comm_dtype, out)
    return out


def largest_by_block(values: Tensor, part_numels: list[int] | None = None) -> Tensor:
    """The largest magnitude in each value's block."""
    parts = values.split(part_numels or [len(values)])
    blocks = [block for part in parts for block in part.split(BLOCK) if len(block)]
    return torch.cat([block.abs().amax().expand(len(block)) for block in blocks])


@st.composite
def buffers(draw: st.DrawFn) -> Tensor:
    """Normal float32 values; magnitudes differ by block and within."""
    count = draw(st.integers(1, 2 * BLOCK + 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    centre = draw(st.integers(-100, 100))
    spread = draw(st.sampled_from([0, 4, 20]))
    exponents = torch.randint(centre - spread, centre + spread + 1, (count,), generator=generator)
    mantissas = (1 + torch.rand(count, generator=generator, dtype=torch.float64)).float()
    signs = 1 - 2 * torch.randint(0, 2, (count,), generator=generator)
    return torch.ldexp(mantissas.double() * signs, exponents).to(draw(st.sampled_from(DTYPES)))


@given(buffers())
def test_bfloat16_error(values: Tensor) -> None:
    error = (through(values, torch.bfloat16) - values).abs()
    assert bool((error <= 2**-8 * values.abs()).all())


@given(buffers(), st.lists(st.integers(0, 2 * BLOCK), max_size=6))
def test_float16_error(values: Tensor, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(values)) for cut in cuts)
    part_numels = [end - begin for begin, end in pairwise([0, *ends, len(values)])]
    error = (through(values, torch.float16, part_numels) - values).abs()
    largest = largest_by_block(values, part_numels)
    near = values.abs() >= 2**-28 * largest
    assert bool(near.any())
    assert bool((error <= 2**-11 * values.abs())[near].all())
    assert bool((error <= 2**-39 * largest).logical_or(near).all()), "smaller values: to half a unit in the last place"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numels", [(3, 5), (1, 2 * BLOCK + 1, 0, 7), (BLOCK, BLOCK), (BLOCK + 1, 1, 1, BLOCK - 1)])
def test_float16_scales_each_matrix_by_itself(numels: tuple[int, ...], dtype: torch.dtype) -> None:
    """Defect: a block straddled an input factor of 1e2 and an output factor of 1e-9, which arrived as zeros."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = (1e2, 1e-9, 1e4, 1e-12)
    parts = [
        magnitude * (1 + torch.rand(numel, generator=generator, dtype=dtype))
        for magnitude, numel in zip(magnitudes, numels, strict=False)
    ]
    arrived = through(torch.cat(parts), torch.float16, list(numels)).split(numels)
    for part, values in zip(parts, arrived, strict=True):
        torch.testing.assert_close(values, part, rtol=2**-11, atol=0)


def test_float16_carries_no_padding() -> None:
    """Parts cost a scale a block each, not a whole block."""
    assert encoded_bytes([3, 0, BLOCK + 1], torch.float16) == 4 * (1 + 0 + 2) + 2 * (3 + BLOCK + 1)
    assert encoded_bytes([3, 2], torch.float16) == 4 * 2 + 2 * (5 + 1)
    assert encoded_bytes([3, 0, BLOCK + 2], torch.bfloat16) == 2 * (BLOCK + 5)


@given(buffers(), st.sampled_from(COMM_DTYPES))
def test_a_second_trip_changes_nothing_but_float16s_smallest_values(values: Tensor, comm_dtype: torch.dtype) -> None:
    """Where a block's largest value was rounded up to a power of two, subnormal halves get one bit less."""
    once = through(values, comm_dtype)
    kept = (
        once.abs() >= 2**-26 * largest_by_block(once) if comm_dtype == torch.float16 else torch.ones_like(once).bool()
    )
    assert torch.equal(through(once, comm_dtype)[kept], once[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_non_finite_values_stay(poison: float, comm_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for place in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 4):
        values = torch.linspace(1, 2, 2 * BLOCK + 5, dtype=dtype)
        values[place] = poison
        arrived = through(values, comm_dtype)
        assert torch.equal(arrived[place].isnan(), values[place].isnan())
        assert not arrived[place].isfinite()
        other = torch.arange(len(values)) // BLOCK != place // BLOCK
        torch.testing.assert_close(arrived[other], values[other], rtol=2**-8, atol=0)


@pytest.mark.parametrize("count", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
def test_zeros_and_sizes(comm_dtype: torch.dtype, count: int) -> None:
    assert torch.equal(through(torch.zeros(count), comm_dtype), torch.zeros(count))
    num_blocks = math.ceil(count / BLOCK)
    expected = 2 * count if comm_dtype == torch.bfloat16 else 4 * num_blocks + 2 * count + 2 * (count % 2)
    assert encoded_bytes([count], comm_dtype) == expected


def test_float16_at_the_ends_of_float32() -> None:
    tiny, huge = 2.0**-149, 2.0**128 - 2.0**117  # the largest that does not round up to 2¹²⁸
    for value in (tiny, 2.0**-126, 2.0**-112, 1e-12, 1e4, huge):
        arrived = through(torch.tensor([value, -value, 0.0]), torch.float16)
        assert arrived.isfinite().all()
        torch.testing.assert_close(arrived, torch.tensor([value, -value, 0.0]), rtol=2**-11, atol=0)


def test_float16_of_float64_beyond_float32() -> None:
    """As a cast to float32 would have it."""
    assert through(torch.tensor([1e300], dtype=torch.float64), torch.float16).isinf().all()
    assert not through(torch.tensor([1e-300], dtype=torch.float64), torch.float16).any()


@pytest.mark.parametrize(("dtype", "comm_dtype"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_buffers_of_half_precision(dtype: torch.dtype, comm_dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, BLOCK + 7).to(dtype)
    torch.testing.assert_close(through(values, comm_dtype), values, rtol=2**-8, atol=1e-9)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"comm_dtype must be torch.bfloat16, torch.float16 or None, got torch.int8"):
        encoded_bytes([3], torch.int8)

"""Upper-triangle packing and the flat buffer that carries packed matrices and gradients."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.tensors.packing import FlatBuffer, Part, pack_symmetric, triangle_numel, unpack_symmetric


def symmetric_stack(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    half = torch.randn(count, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return half + half.mT


@pytest.mark.parametrize(("size", "numel"), [(1, 1), (2, 3), (3, 6), (4608, 10_619_136)])
def test_triangle_numel(size: int, numel: int) -> None:
    assert triangle_numel(size) == numel


def test_packed_order_is_the_rows_of_the_upper_triangle() -> None:
    stack = torch.tensor([[[1.0, 2, 3], [2, 4, 5], [3, 5, 6]], [[7, 8, 9], [8, 10, 11], [9, 11, 12]]])
    packed = torch.empty(12)
    pack_symmetric(stack, out=packed)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_strict_lower_triangle_is_not_read() -> None:
    stack = symmetric_stack(2, 4)
    broken = stack.triu() + torch.full_like(stack, 1e9).tril(-1)
    packed = torch.empty(20, dtype=torch.float64)
    pack_symmetric(broken, out=packed)
    assert torch.equal(unpack_symmetric(packed, 2, 4), stack)


@settings(deadline=None)
@given(
    count=st.integers(1, 5),
    size=st.integers(1, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_round_trip_is_exact(count: int, size: int, seed: int, dtype: torch.dtype) -> None:
    stack = symmetric_stack(count, size, seed, dtype)
    packed = torch.full((count * triangle_numel(size),), torch.nan, dtype=dtype)
    pack_symmetric(stack, out=packed)
    unpacked = unpack_symmetric(packed, count, size)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, stack)


def test_packing_into_a_view_leaves_its_neighbours_alone() -> None:
    storage = torch.full((8,), -1.0)
    pack_symmetric(torch.tensor([[[1.0, 2], [2, 3]]]), out=storage[2:5])
    assert storage.tolist() == [-1, -1, 1, 2, 3, -1, -1, -1]


def test_unpacked_matrices_do_not_share_the_buffer() -> None:
    packed = torch.tensor([1.0, 2, 3])
    unpacked = unpack_symmetric(packed, 1, 2)
    packed.zero_()
    assert unpacked.tolist() == [[[1, 2], [2, 3]]]


def test_a_stack_that_is_not_contiguous() -> None:
    stack = symmetric_stack(2, 3).mT
    packed = torch.empty(12, dtype=torch.float64)
    pack_symmetric(stack, out=packed)
    assert torch.equal(unpack_symmetric(packed, 2, 3), stack)


# The flat buffer -----------------------------------------------------------------------------------------


def test_flat_buffer_by_hand() -> None:
    parts = [Part("a", 1, 2), Part("b", 0, 3), Part("a", 0, 2), Part("c", 3, 1)]
    buffer = FlatBuffer(parts, num_ranks=4, storage=torch.arange(20.0))
    assert buffer.counts == [5, 2, 0, 1]
    assert buffer.part_numels == [[3, 2], [2], [], [1]]
    assert buffer.data.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert buffer.part("b", 0).tolist() == [0, 1, 2]
    assert buffer.part("a", 0).tolist() == [3, 4]
    assert buffer.part("a", 1).tolist() == [5, 6]
    assert buffer.part("c", 3).tolist() == [7]
    assert buffer.segment(2).numel() == 0
    assert buffer.segment(1).tolist() == [5, 6]
    assert [copy.tolist() for copy in buffer.copies("a")] == [[3, 4], [5, 6]], "rank order, not order given"
    assert "a" in buffer
    assert "d" not in buffer


def test_flat_buffer_refuses_a_key_twice_on_one_rank() -> None:
    with pytest.raises(AssertionError, match="a twice on rank 1"):
        FlatBuffer([Part("a", 1, 2), Part("a", 1, 2)], num_ranks=2, storage=torch.zeros(4))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Part]]:
    num_ranks = draw(st.integers(1, 5))
    keys = st.tuples(st.sampled_from("abcdefg"), st.integers(0, num_ranks - 1))
    places = draw(st.lists(keys, unique=True, max_size=15))
    numels = {key: draw(st.integers(0, 6)) for key, _ in places}
    return num_ranks, [Part(key, rank, numels[key]) for key, rank in places]


@settings(deadline=None)
@given(layout=layouts(), spare=st.integers(0, 3))
def test_flat_buffer_invariants(layout: tuple[int, list[Part]], spare: int) -> None:
    num_ranks, parts = layout
    total = sum(part.numel for part in parts)
    storage = torch.full((total + spare,), -1.0)
    buffer = FlatBuffer(parts, num_ranks, storage)
    by_rank = [[part for part in parts if part.rank == rank] for rank in range(num_ranks)]

    assert buffer.counts == [sum(part.numel for part in own) for own in by_rank]
    assert buffer.part_numels == [[part.numel for part in own] for own in by_rank]
    assert buffer.data.numel() == total
    assert [buffer.segment(rank).numel() for rank in range(num_ranks)] == buffer.counts
    # Parts are told apart by writing a number of its own into each; in the buffer they stand by rank, in order.
    for number, part in enumerate(parts):
        buffer.part(part.key, part.rank).fill_(number)
    expected = [float(parts.index(part)) for own in by_rank for part in own for _ in range(part.numel)]
    assert buffer.data.tolist() == expected
    assert storage.tolist() == expected + [-1.0] * spare
    starts = [0, *accumulate(buffer.counts)]
    for rank in range(num_ranks):
        assert buffer.segment(rank).tolist() == expected[starts[rank] : starts[rank + 1]]
    for key in {part.key for part in parts}:
        ranks = sorted(part.rank for part in parts if part.key == key)
        copies = buffer.copies(key)
        assert len(copies) == len(ranks)
        for copy, rank in zip(copies, ranks, strict=True):
            assert copy.data_ptr() == buffer.part(key, rank).data_ptr()
            assert copy.tolist() == buffer.part(key, rank).tolist()

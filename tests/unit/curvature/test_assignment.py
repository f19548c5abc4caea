"""Which rank owns which layer: cost model and greedy assignment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.curvature.assignment import LayerCost, assign_owners, inversion_flops


@pytest.mark.parametrize(
    ("sizes", "num_values", "flops"),
    [
        ([], 7, 0.0),  # plain gradient: nothing to factorise or solve
        ([(1, 3)], 0, 9.0),
        ([(1, 3), (1, 6)], 18, 9 + 72 + 2 * 3 * 18 + 2 * 6 * 18),  # a layer 6 × 3
        ([(2, 3), (2, 6)], 36, 18 + 144 + 2 * 3 * 36 + 2 * 6 * 36),  # the same in two groups: twice as much
        ([(8, 1)], 8, 8 / 3 + 16),  # BatchNorm, 4 channels, diagonal
        ([(4, 2)], 8, 32 / 3 + 32),  # unit-wise
        ([(1, 8)], 8, 512 / 3 + 128),  # full
    ],
)
def test_inversion_flops(sizes: list[tuple[int, int]], num_values: int, flops: float) -> None:
    assert inversion_flops(sizes, num_values) == pytest.approx(flops, rel=1e-15)


def costs(flops: list[float], num_bytes: list[int] | None = None) -> list[LayerCost]:
    return [LayerCost(f, b) for f, b in zip(flops, num_bytes or [4] * len(flops), strict=True)]


@pytest.mark.parametrize(
    ("layers", "num_ranks", "owners"),
    [
        (costs([5, 1, 3]), 1, [(0,), (0,), (0,)]),
        # Largest first: 9→0, 7→1, 6→2, 5→2 (6+5=11), 4→1 (7+4=11), 2→0 (9+2=11).
        (costs([2, 4, 5, 6, 7, 9]), 3, [(0,), (1,), (2,), (2,), (1,), (0,)]),
        # Equal operations: the one with more bytes first; on equal loads the rank with fewer bytes.
        (costs([4, 4, 0, 0], [10, 20, 8, 4]), 2, [(1,), (0,), (1,), (1,)]),
        (costs([1, 1]), 2, [(0,), (1,)]),
        # 12 takes two of the further ranks (12 → 6 → 4), then 5 one, since 5 > 4: 12 bytes, of 27 allowed.
        (costs([5, 12, 0], [4, 4, 100]), 6, [(1, 5), (0, 3, 4), (2,)]),
        # A copy of the layer with 100 bytes would add more than a quarter of 104; the other takes 6 copies of 4.
        (costs([12, 5], [100, 4]), 4, [(0,), (1, 2, 3)]),
        (costs([12, 5], [100, 4]), 12, [(0,), (1, 2, 3, 4, 5, 6, 7)]),
        (costs([3]), 3, [(0,)]),
        ([], 2, []),
    ],
)
def test_by_hand(layers: list[LayerCost], num_ranks: int, owners: list[tuple[int, ...]]) -> None:
    assert assign_owners(layers, num_ranks) == owners


lists_of_costs = st.lists(
    st.builds(
        LayerCost,
        flops=st.one_of(st.just(0.0), st.integers(1, 10**6).map(float)),
        num_bytes=st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=30,
)


@given(layers=lists_of_costs, num_ranks=st.integers(1, 40))
def test_invariants(layers: list[LayerCost], num_ranks: int) -> None:
    owners = assign_owners(layers, num_ranks)
    assert owners == assign_owners(list(layers), num_ranks), "deterministic"
    assert len(owners) == len(layers)
    for ranks in owners:
        assert len(ranks) >= 1
        assert list(ranks) == sorted(set(ranks)), "ascending, each once"
        assert ranks[0] >= 0
        assert ranks[-1] < num_ranks
    used = {rank for ranks in owners for rank in ranks}
    assert used == set(range(len(used))), "only the last ranks may be left without a layer"


@given(layers=lists_of_costs, num_ranks=st.integers(1, 40))
def test_up_to_as_many_ranks_as_layers_each_has_one_owner_and_the_load_is_bounded(
    layers: list[LayerCost], num_ranks: int
) -> None:
    num_ranks = min(num_ranks, len(layers))
    owners = assign_owners(layers, num_ranks)
    assert all(len(ranks) == 1 for ranks in owners)
    assert {rank for (rank,) in owners} == set(range(num_ranks)), "nobody idles"
    loads = [0.0] * num_ranks
    for (rank,), layer in zip(owners, layers, strict=True):
        loads[rank] += layer.flops
    total, largest = sum(layer.flops for layer in layers), max(layer.flops for layer in layers)
    assert max(loads) <= (total / num_ranks + (1 - 1 / num_ranks) * largest) * (1 + 1e-12)


@given(layers=lists_of_costs, further=st.integers(1, 40))
def test_with_more_ranks_than_layers_the_costliest_get_help_as_far_as_bytes_allow(
    layers: list[LayerCost], further: int
) -> None:
    num_ranks = len(layers) + further
    owners = assign_owners(layers, num_ranks)
    owning = sorted(rank for ranks in owners for rank in ranks)
    assert owning == list(range(len(owning))), "at most one layer a rank"
    copies = sum(layer.num_bytes * (len(ranks) - 1) for layer, ranks in zip(layers, owners, strict=True))
    left = 0.25 * sum(layer.num_bytes for layer in layers) - copies
    assert left >= 0
    shares = [layer.flops / len(ranks) for layer, ranks in zip(layers, owners, strict=True) if layer.num_bytes <= left]
    assert len(owning) == num_ranks or not shares, "a rank owns nothing only where nothing more fits"
    for layer, ranks in zip(layers, owners, strict=True):
        if len(ranks) > 1 and shares:  # its last helper could not have been put to better use
            assert layer.flops / (len(ranks) - 1) >= max(shares)


@given(layers=lists_of_costs, num_ranks=st.integers(1, 40), frozen=st.sets(st.integers(0, 29)))
def test_what_has_owners_keeps_them_and_gets_no_others(
    layers: list[LayerCost], num_ranks: int, frozen: set[int]
) -> None:
    """Defect: a rank whose layers were all frozen joined another's layer, of whose Fisher it had nothing."""
    before = assign_owners(layers, num_ranks)
    trained = [number for number in range(len(layers)) if number not in frozen]
    kept = dict(enumerate(before[number] for number in trained))
    assert assign_owners([layers[number] for number in trained], num_ranks, kept) == list(kept.values())

"""The stream of samples against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.data.random_streams import RandomStream
from kfac_dist.data.sampling import SlotSampler


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(1, 23),
    per_slot=st.integers(1, 30),
    num_slots=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_slots_in_order_are_the_stream(num_samples: int, per_slot: int, num_slots: int, seed: int) -> None:
    sampler = SlotSampler(num_samples, per_slot, num_slots, seed)
    iterations = 4
    stream = np.concatenate([sampler.indices(t, slot) for t in range(iterations) for slot in range(num_slots)])
    assert stream.dtype == np.int64
    assert len(stream) == iterations * per_slot * num_slots
    num_epochs = -(-len(stream) // num_samples)
    orders = [np.random.default_rng([seed, RandomStream.ORDER, e]).permutation(num_samples) for e in range(num_epochs)]
    np.testing.assert_array_equal(stream, np.concatenate(orders)[: len(stream)])


def test_every_epoch_has_each_sample_once_in_another_order() -> None:
    sampler = SlotSampler(num_samples=50, per_slot=5, slots_per_iteration=2, seed=0)
    epochs = [
        np.concatenate([sampler.indices(t, slot) for t in range(5 * e, 5 * e + 5) for slot in range(2)])
        for e in range(2)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(SlotSampler(50, 50, 1, seed=1).indices(0, 0), epochs[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 7])
def test_ranks_share_the_slots(num_ranks: int) -> None:
    sampler = SlotSampler(100, 4, 6, seed=0)
    shares = [list(sampler.local_slots(rank, num_ranks)) for rank in range(num_ranks)]
    assert sorted(slot for share in shares for slot in share) == list(range(6))
    assert all(slot % num_ranks == rank for rank, share in enumerate(shares) for slot in share)


@pytest.mark.parametrize(
    ("num_samples", "global_size", "epochs", "iterations"),
    [
        (1000, 100, 3, 30),
        (1001, 100, 1, 11),
        (100, 10, 1.1, 11),
        (100, 32, 0.5, 2),
        (10, 64, 1, 1),
        (10, 64, 13, 3),
    ],
)
def test_num_iterations(num_samples: int, global_size: int, epochs: float, iterations: int) -> None:
    assert SlotSampler(num_samples, global_size // 2, 2, seed=0).num_iterations(epochs) == iterations


def test_epoch_at() -> None:
    sampler = SlotSampler(num_samples=1000, per_slot=32, slots_per_iteration=4, seed=0)
    assert [sampler.epoch_at(t) for t in (0, 1, 10)] == [0.0, 0.128, 1.28]

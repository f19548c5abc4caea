"""Collectives by the alpha-beta model, by hand: 1 s a step and 1 GB/s within a node, 10 s and 0.5 GB/s between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.planning.network import Fabric
from tests.unit.planning.machines import machine

GB = 10**9


def test_one_rank_sends_nothing():
    fabric = Fabric(machine(), 1)
    assert fabric.v_collective([GB]) == fabric.all_reduce(GB) == fabric.exchange([GB]) == 0.0


def test_v_collective_in_a_node():
    # 3 steps around the ring, 3 more for the segments behind the first; 3/4 of 4 GB at 1 GB/s
    assert Fabric(machine(), 4).v_collective([GB] * 4) == pytest.approx(3 + 3 + 3.0)
    assert Fabric(machine(), 4).v_collective([4 * GB, 0, 0, 0]) == pytest.approx(3 + 3 + 3.0)


def test_v_collective_over_nodes():
    # 8 ranks on 2 nodes: 6 steps within and 1 between, 7 for the segments; 7/8 of 8 GB at a node's 0.5 GB/s
    assert Fabric(machine(), 8).v_collective([GB] * 8) == pytest.approx(6 * 1 + 10 + 7 + 7 / 0.5)


def test_all_reduce_takes_the_ring_or_the_tree():
    # 16 ranks on 4 nodes. Ring: 2·(12·1 + 3·10) steps. Tree: 2·(2·10 + 3·1), and 2·S/B
    fabric = Fabric(machine(), 16)
    assert fabric.all_reduce(0) == pytest.approx(2 * (2 * 10 + 3))
    large = 1000 * GB
    assert fabric.all_reduce(large) == pytest.approx(2 * (12 + 30) + 2 * large * 15 / 16 / (GB / 2))
    assert fabric.all_reduce(GB) == pytest.approx(2 * 23 + 2 / 0.5)


def test_encoded_segments_all_go_to_their_owner():
    # The owner of 2 GB gets them from three others, at a rank's 1 GB/s
    assert Fabric(machine(), 4).exchange([2 * GB, 0, 0, 0]) == pytest.approx(3 * 1 + 3 * 2)
    # Over nodes it has a fourth of its node's adapters
    assert Fabric(machine(), 8).exchange([2 * GB] + [0] * 7) == pytest.approx(7 * 1 + 7 * 2 / (0.5 / 4))


def test_mpi_reduces_to_each_owner_in_turn_by_trees():
    fabric = Fabric(machine(device="cpu"), 4)
    assert fabric.v_collective([GB, GB, 0, 0]) == pytest.approx(2 * 2 + 2 * 3 / 4)
    assert fabric.all_reduce(0) == pytest.approx(2 * 2)


def test_more_ranks_than_devices_share_them():
    profile = machine(num_nodes=1, devices_per_node=2)
    assert [Fabric(profile, ranks).sharing for ranks in (1, 2, 4, 6)] == [1, 1, 2, 3]
    assert [Fabric(profile, ranks).num_nodes for ranks in (1, 4)] == [1, 1]
    assert Fabric(machine(devices_per_node=2), 6).num_nodes == 3
    alone = Fabric(machine(num_nodes=1, devices_per_node=4), 4).v_collective([GB] * 4)
    assert Fabric(profile, 4).v_collective([GB] * 4) == pytest.approx(2 * alone)


@given(ranks=st.integers(2, 4096), size=st.integers(0, 10**9), more=st.integers(1, 10**9))
def test_more_bytes_and_slower_links_never_take_less(ranks, size, more):
    network = machine().network
    slow = network.inter_node.model_copy(update={"gigabytes_per_second": 0.1, "latency_seconds": 20.0})
    slower = machine().model_copy(update={"network": network.model_copy(update={"inter_node": slow})})
    for name in ("v_collective", "exchange"):
        small, large = [size] * ranks, [size + more] * ranks
        assert getattr(Fabric(machine(), ranks), name)(small) <= getattr(Fabric(machine(), ranks), name)(large)
        assert getattr(Fabric(machine(), ranks), name)(small) <= getattr(Fabric(slower, ranks), name)(small)
    assert Fabric(machine(), ranks).all_reduce(size) <= Fabric(machine(), ranks).all_reduce(size + more)
    assert Fabric(machine(), ranks).all_reduce(size) <= Fabric(slower, ranks).all_reduce(size)

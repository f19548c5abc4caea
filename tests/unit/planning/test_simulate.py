"""Iterations on machines of round figures: imbalance, overlap, shares, memory, and what must never fall or rise."""

from typing import Any

import pytest
import torch
from torch import nn

from kfac_dist.config.load import create_config
from kfac_dist.config.schema import Config
from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.create import block_cost, create_blocks
from kfac_dist.errors import InputError
from kfac_dist.optim import gradient_messages
from kfac_dist.optim.buffers import StageBuffers, all_factor_keys
from kfac_dist.planning.memory import largest_unfolding, rank_memory
from kfac_dist.planning.network import Fabric
from kfac_dist.planning.simulate import PLAN_STAGES, Simulation
from kfac_dist.planning.work import OwnedWorks, Refresh, slot_work
from tests.unit.planning.machines import machine

ALL = ("A", "G", "F")


def configuration(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "run": {"name": "planned"},
        "data": {
            "name": "synthetic",
            "synthetic": {"shape": [1, 8, 8], "num_classes": 10, "num_train": 640, "num_eval": 8},
        },
        "model": {"name": "digits_cnn"},
        "batch": {"global_size": 64, "per_rank": 4},
        "train": {"epochs": 10},
        "optimizer": {"name": "kfac", "learning_rate": 0.1, "momentum": 0.9},
        "kfac": {
            "damping": {"initial": 0.1, "target": 0.1, "warmup_steps": 0, "batchnorm_ratio": 16},
            "refresh": {"schedule": "every", "interval": 1},
        },
        "schedule": {"kind": "constant"},
    }
    return create_config(settings | changes, "a test")


def every(interval: int) -> dict[str, Any]:
    damping = {"initial": 0.1, "target": 0.1, "warmup_steps": 0, "batchnorm_ratio": 16}
    return {"damping": damping, "refresh": {"schedule": "every", "interval": interval}}


SGD = {"kfac": None, "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}
FREE_NETWORK = {
    "intra_node": {"latency_seconds": 0.0, "gigabytes_per_second": 1e9, "efficiency": 1.0, "source": "made up"},
    "inter_node": {"latency_seconds": 0.0, "gigabytes_per_second": 1e9, "efficiency": 1.0, "source": "made up"},
}


def test_a_slot_is_what_its_layers_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to("meta")
    layer = net[1]
    simulation = Simulation(configuration(), machine())
    blocks = [type(simulation.blocks[-1]).create("1", layer, list(layer.parameters()), "diagonal")]
    work = slot_work(net, blocks, (3, 2, 2), 5, images=8)
    assert sum(found.flops for found in work.forward) == 2 * 8 * 12 * 5
    assert sum(found.flops for found in work.backward) == 2 * 8 * 12 * 5, "the images need no gradient"
    flops = {matrix: sum(found.flops for found in operations) for matrix, operations in work.factors.items()}
    assert flops == {"A": 2 * 8 * 12 * 12, "G": 2 * 8 * 5 * 5}
    part = slot_work(net, blocks, (3, 2, 2), 5, images=8, sample_fraction=0.25).factors
    flops = {matrix: sum(found.flops for found in operations) for matrix, operations in part.items()}
    assert flops == {"A": 2 * 2 * 12 * 12, "G": 2 * 2 * 5 * 5}
    for matrix, operations in work.further_factors.items():
        assert sum(found.values for found in operations) > sum(found.values for found in work.factors[matrix])


def test_an_owner_factorises_and_solves_what_it_owns():
    layer = nn.Linear(6, 4, bias=False)
    (block,) = create_blocks(layer, list(layer.parameters()), "diagonal")
    works = OwnedWorks()
    fresh, stale = works.of([block], Refresh.of(ALL, {})), works.of([block], Refresh.of((), {}))
    # A, 6 rows, is solved with as its factor; G, 4 rows, is inverted, for it is multiplied by 6 columns
    flops = {
        kind: sum(found.flops for found in fresh.inverse if found.kind == kind) for kind in ("factorise", "invert")
    }
    assert flops == {"factorise": pytest.approx((6**3 + 4**3) / 3), "invert": pytest.approx(2 * 4**3 / 3)}
    for work in (fresh, stale):
        flops = {
            kind: sum(found.flops for found in work.precondition if found.kind == kind) for kind in ("product", "solve")
        }
        assert flops == {"product": 2 * 4 * 24, "solve": 2 * 6 * 24}
    assert stale.inverse == []
    inverted = works.of([block], Refresh.of(ALL, dict.fromkeys(ALL, 2)))  # two times four columns are more than six
    flops = {kind: sum(found.flops for found in inverted.inverse if found.kind == kind) for kind in ("invert", "solve")}
    assert flops == {"invert": pytest.approx(2 * (6**3 + 4**3) / 3), "solve": 0.0}
    assert {found.kind for found in inverted.precondition if found.flops} == {"product"}
    only_A = works.of([block], Refresh.of("A", {}))
    assert sum(found.flops for found in only_A.inverse) == pytest.approx(6**3 / 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
def test_the_slowest_owner_counts(num_ranks):
    simulation = Simulation(configuration(), machine(network=FREE_NETWORK, devices_per_node=16))
    blocks = simulation.blocks
    owners = assign_owners([block_cost(block) for block in blocks], num_ranks)
    loads = [0.0] * num_ranks
    for block, ranks in zip(blocks, owners, strict=True):
        for count, size in block.factor_shapes.values():
            seconds = count * size**3 / 3 / 0.5e12
            if block.num_values >= count * size**2:  # as many columns as rows: inverted, as a GPU does it
                seconds += count * 2 * size**3 / 0.25e12 + 2 * size * block.num_values / 1e12
            else:
                seconds += 2 * size * block.num_values / 0.25e12
            for rank in ranks:
                loads[rank] += seconds if size > 1 else 0.0
    stages = simulation.predict(num_ranks).stages
    assert stages["inverse"] + stages["precondition"] == pytest.approx(max(loads), rel=0.01)


def test_gradients_travel_while_matrices_are_factorised_but_not_over_mpi():
    slow = machine(factorise={"teraflops": 1e-7}, devices_per_node=16)
    overlapped = Simulation(configuration(), slow)
    apart = Simulation(configuration(communication={"backend": "mpi"}), slow)
    buffers = StageBuffers(
        overlapped.blocks,
        assign_owners([block_cost(block) for block in overlapped.blocks], 2),
        2,
        torch.float32,
        torch.device("meta"),
    )
    fabric = Fabric(slow, 2)
    (message,) = buffers.messages
    gradients = fabric.v_collective([4 * count for count in message.buffer.counts])
    factors = fabric.v_collective([4 * n for n in buffers.factors(all_factor_keys(overlapped.blocks)).counts])
    assert overlapped.predict(2).stages["inverse"] > gradients, "it hides all of them"
    hidden = apart.predict(2).seconds - overlapped.predict(2).seconds
    assert hidden == pytest.approx(gradients)
    expected = factors + 2 * fabric.all_reduce(0)
    assert overlapped.predict(2).stages["reduce_scatter"] == pytest.approx(expected, rel=1e-3)
    fast = Simulation(configuration(), machine(devices_per_node=16)).predict(2)
    assert fast.stages["reduce_scatter"] == pytest.approx(expected + gradients - fast.stages["inverse"], rel=1e-3)


def seconds_of_messages(simulation: Simulation, num_ranks: int) -> list[float]:
    """Of the gradients' messages over NCCL."""
    owners = assign_owners([block_cost(block) for block in simulation.blocks], num_ranks)
    buffers = StageBuffers(simulation.blocks, owners, num_ranks, torch.float32, torch.device("meta"), True)
    fabric = Fabric(simulation.profile, num_ranks)
    return [fabric.v_collective([4 * count for count in message.buffer.counts]) for message in buffers.messages]


def test_gradients_travel_beside_the_backward_pass_but_for_the_last_message(monkeypatch):
    """A long pass hides all but the last message; one in no time hides nothing."""
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES", 300)
    monkeypatch.setattr(gradient_messages, "MESSAGE_BYTES_PER_RANK", 0)
    stale = Refresh.of((), dict.fromkeys(ALL, 10))
    fixed = 2 * Fabric(machine(), 2).all_reduce(0)
    for ratio, hidden in ((1e12, slice(-1)), (1e-9, slice(0))):
        simulation = Simulation(configuration(), machine(training={"ratio": ratio}, devices_per_node=16))
        messages = seconds_of_messages(simulation, 2)
        assert len(messages) > 2
        shown = simulation.predict(2, shares={stale: 1.0}).stages["reduce_scatter"] - fixed
        assert shown == pytest.approx(sum(messages) - sum(messages[hidden]), rel=1e-3)
        over_mpi = Simulation(configuration(communication={"backend": "mpi"}), simulation.profile)
        assert over_mpi.predict(2, shares={stale: 1.0}).stages["reduce_scatter"] > sum(messages[:1])


def test_the_mean_is_by_the_shares_of_the_schedule():
    fresh = Simulation(configuration(kfac=every(1)), machine())
    tenth = Simulation(configuration(kfac=every(10)), machine())
    assert tenth.config.kfac is not None
    shares = tenth.shares(tenth.config.kfac.refresh)
    served = dict.fromkeys(ALL, 10)
    assert shares == {Refresh.of(ALL, served): 0.1, Refresh.of((), served): 0.9}
    found = tenth.predict(4)
    assert found.refresh_interval == pytest.approx(10.0)
    assert found.seconds == pytest.approx(0.1 * found.refresh_seconds + 0.9 * found.stale_seconds)
    assert found.stages["factors"] == pytest.approx(0.1 * fresh.predict(4).stages["factors"])
    assert found.stages["forward"] == fresh.predict(4).stages["forward"]


def test_work_is_per_slot_and_ratios_multiply_it():
    plain = Simulation(configuration(), machine())
    slowed = Simulation(configuration(), machine(training={"ratio": 2.0}, factors={"ratio": 3.0}))
    one, four = plain.predict(16), plain.predict(4)
    assert (one.slots, four.slots) == (1, 4)
    for stage in ("forward", "backward"):
        assert four.stages[stage] == pytest.approx(4 * one.stages[stage])
        assert slowed.predict(4).stages[stage] == pytest.approx(2 * four.stages[stage])
    assert slowed.predict(4).stages["factors"] == pytest.approx(3 * four.stages["factors"])
    assert four.num_iterations == 100
    assert four.hours == pytest.approx(100 * four.seconds / 3600)


def test_half_precision_uses_its_own_rate_and_half_the_bytes():
    fp32, fp16 = (
        Simulation(configuration(train={"epochs": 10, "precision": precision}), machine()).predict(16)
        for precision in ("fp32", "fp16")
    )
    assert fp16.stages["forward"] == pytest.approx(fp32.stages["forward"] / 2, rel=1e-3), "2 of 1 TFLOP/s"
    assert fp16.memory["activations"] * 2 == fp32.memory["activations"]
    assert fp16.stages["inverse"] == pytest.approx(fp32.stages["inverse"])


def test_encoded_factors_are_exchanged():
    plain = Simulation(configuration(), machine()).predict(16)
    encoded = Simulation(configuration(communication={"factor_precision": "bf16"}), machine()).predict(16)
    assert encoded.stages["reduce_scatter"] != plain.stages["reduce_scatter"]
    assert encoded.memory["fisher"] > plain.memory["fisher"], "the owner's segment from every rank"


def test_sgd_has_no_curvature():
    simulation = Simulation(configuration(**SGD), machine())
    point = simulation.predict(4)
    agreements = 2 * Fabric(machine(), 4).all_reduce(0)  # which DistributedDataParallel does without
    assert point.seconds == pytest.approx(point.sgd_seconds + agreements)
    assert point.stages["factors"] == point.stages["inverse"] == point.stages["precondition"] == 0.0
    assert set(point.stages) == set(PLAN_STAGES)
    assert "fisher" not in point.memory
    values = sum(parameter.numel() for parameter in simulation.model.parameters())
    communication = Fabric(machine(), 4).all_reduce(4 * values) + agreements
    assert point.stages["reduce_scatter"] + point.stages["all_gather"] == pytest.approx(communication)
    assert Simulation(configuration(), machine()).predict(4).sgd_seconds == pytest.approx(point.sgd_seconds)


@pytest.mark.parametrize("num_ranks", [1, 4, 16])
def test_memory_is_that_of_planning_memory(num_ranks):
    simulation = Simulation(configuration(), machine())
    found = simulation.predict(num_ranks).memory
    fisher = rank_memory(simulation.model, "diagonal", num_ranks)
    kept = (fisher.buffers, fisher.largest_running, fisher.largest_solvers, fisher.largest_tables)
    assert found["fisher"] == sum(kept)
    assert found["weights"] == 3 * 4 * sum(parameter.numel() for parameter in simulation.model.parameters())
    assert found["unfolding"] == largest_unfolding(simulation.model, (1, 8, 8), 4)[1]


def test_activations_are_what_autograd_keeps():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).to("meta")
    work = slot_work(net, [], (3, 2, 2), 2, images=8)
    # The images, the output of the ReLU (which it and the second layer keep once), the log-softmax, labels, their sum
    assert work.activation_values == 8 * (12 + 5 + 2) + 8 + 1


@pytest.mark.parametrize(
    "better",
    [
        {"half": {"teraflops": 8.0}, "single": {"teraflops": 2.0}},
        {"factorise": {"teraflops": 1.0}},
        {"solve": {"teraflops": 1.0}},
        {"memory": {"gigabytes_per_second": 2e9}},
        {"network": FREE_NETWORK},
    ],
)
def test_a_faster_machine_is_never_slower(better):
    slow, fast = Simulation(configuration(), machine()), Simulation(configuration(), machine(**better))
    savings = [slow.predict(num_ranks).seconds - fast.predict(num_ranks).seconds for num_ranks in (1, 2, 4, 16)]
    assert min(savings) >= 0 < max(savings)


def test_sharing_out_never_makes_an_owner_slower():
    simulation = Simulation(configuration(), machine(network=FREE_NETWORK))
    owners = [simulation.predict(num_ranks).stages for num_ranks in (1, 2, 4, 8, 16)]
    loads = [stages["inverse"] + stages["precondition"] for stages in owners]
    assert loads == sorted(loads, reverse=True)
    assert loads[-1] < loads[0]


def test_ranks_that_share_a_device_take_as_much_longer():
    alone = Simulation(configuration(), machine(network=FREE_NETWORK)).predict(4)
    shared = Simulation(configuration(), machine(network=FREE_NETWORK, num_nodes=1, devices_per_node=2)).predict(4)
    assert shared.seconds == pytest.approx(2 * alone.seconds, rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"batch\.global_size must be a multiple"):
        Simulation(configuration(), machine()).predict(3)

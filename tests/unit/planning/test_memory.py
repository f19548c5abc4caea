"""The memory report: Figure 4's numbers, and what a rank really holds."""

import pytest
import torch
from torch import nn

from kfac_dist.curvature.assignment import assign_owners
from kfac_dist.curvature.blocks.create import block_cost, create_blocks
from kfac_dist.memory import main
from kfac_dist.models import create_model
from kfac_dist.optim.buffers import StageBuffers, all_factor_keys
from kfac_dist.planning import memory
from kfac_dist.tensors import packing

MIB = 2**20


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return create_model("resnet50", 1000, (3, 224, 224), seed=0)


def test_figure_4(resnet50):
    sizes = memory.fisher_memory(resnet50)
    assert round((sizes.kronecker + sizes.batchnorm["full"]) / MIB) == 1017
    assert round((sizes.kronecker + sizes.batchnorm["diagonal"]) / MIB) == 587
    assert round(sizes.kronecker_packed / MIB, 1) == 293.6
    assert round(sizes.batchnorm_packed["full"] / MIB, 1) == 215.3
    assert round(sizes.batchnorm_packed["unit"] / MIB, 2) == 0.30
    assert round(sizes.batchnorm_packed["diagonal"] / MIB, 2) == 0.20


@pytest.mark.parametrize("num_ranks", [1, 3, 200])
def test_buffers_are_those_that_the_optimizer_allocates(num_ranks):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4))
    blocks = create_blocks(net, list(net.parameters()), "unit")
    owners = assign_owners([block_cost(block) for block in blocks], num_ranks)
    exchange = StageBuffers(blocks, owners, num_ranks, torch.float32, torch.device("meta"))
    gradients = [message.buffer for message in exchange.messages]
    buffers = (exchange.factors(all_factor_keys(blocks)), *gradients, exchange.updates())
    allocated = sum(buffer.data.numel() for buffer in buffers)
    assert memory.rank_memory(net, "unit", num_ranks).buffers == 4 * allocated


def test_sharing_stops_at_the_largest_layer(resnet50):
    whole = memory.rank_memory(resnet50, "diagonal", 1)
    shared = memory.rank_memory(resnet50, "diagonal", 64)
    assert whole.largest_running == memory.fisher_memory(resnet50).kronecker + sum(
        4 * 2 * module.num_features for module in resnet50.modules() if isinstance(module, nn.BatchNorm2d)
    )
    largest_layer = 4 * (4608**2 + 512**2)  # a 3×3 convolution of 512 to 512 channels
    assert shared.largest_running == pytest.approx(largest_layer, rel=0.02)


def test_unfolding_of_a_known_convolution():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    im2col, unfolded = memory.largest_unfolding(net, (4, 10, 10), batch=5)
    assert im2col == 4 * 5 * 100 * 4 * 9
    assert unfolded == 4 * 5 * 100 * 4 * 3


def test_report_and_its_errors(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory", "resnet20", "--image-size", "32", "--classes", "10", "--ranks", "2"])
    assert main() == 0
    assert "2 ranks" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["memory", "resnet2"])
    assert main() == 2
    assert "model.name must be a known model, got 'resnet2'" in capsys.readouterr().err


def test_the_report_gives_a_total_and_says_what_it_counts():
    text = memory.report("resnet20", (3, 32, 32), 10, batch=32, ranks=[1, 4])
    for line, num_ranks in zip([line for line in text.splitlines() if " ranks  " in line], (1, 4), strict=True):
        words = line.split()
        assert words[:2] == [str(num_ranks), "ranks"]
        *cells, total = map(float, words[2:])
        assert len(cells) == 4
        assert total == pytest.approx(sum(cells), abs=0.25)  # of rounded figures
    for word in ("buffers", "running", "solvers", "tables"):
        assert sum(line.startswith(f"  {word}: ") for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--ranks", "4", "0"], "--ranks must be >= 1, got 0"),
        (["--batch", "-3"], "--batch must be >= 1, got -3"),
        (["--image-size", "0"], "--image-size must be >= 1, got 0"),
        (["--channels", "0"], "--channels must be >= 1, got 0"),
        (["--classes", "-1"], "--classes must be >= 1, got -1"),
    ],
)
def test_numbers_that_make_no_sense(arguments, problem, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory", "resnet20", *arguments])
    assert main() == 2
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_index_tables_are_those_that_packing_keeps():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    packing._triangle_index.cache_clear()
    packing._mirror_index.cache_clear()
    sizes = {28, 8, 9, 4}  # A and G of the convolution, A and G of the linear layer; BatchNorm's are 1×1
    cpu = torch.device("cpu")
    kept = sum(
        t.nbytes for size in sizes for t in (packing._triangle_index(size, cpu), packing._mirror_index(size, cpu))
    )
    assert memory.rank_memory(net, "diagonal", 1).largest_tables == kept
    assert memory.rank_memory(net, "diagonal", 2).largest_tables < kept

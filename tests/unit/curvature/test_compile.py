"""A compiled model under K-FAC trains as it does uncompiled. One process, the compiler's default backend on the CPU."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kfac_dist import KFAC
from tests.small_net import make_kfac

NUM_LAYERS = 10  # of one shape, and more than torch._dynamo.config.recompile_limit


pytestmark = [
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler, g++ or $CXX"
    ),
    # The compiler itself looks at .grad of tensors that are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True).flatten(1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def train(way: str) -> tuple[list[float], list[int]]:
    """Losses of eight steps, and of each the number of layers that were captured."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    net: Any = Residual()
    net.layers[3].requires_grad_(False)
    forward = torch.compile(net) if "before" in way else net
    optimizer: KFAC = make_kfac(forward, damping=0.1)
    if way == "after":
        forward = torch.compile(net)
    elif way == "in place":
        net.compile()
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16)
    losses, captured = [], []
    for step in range(8):
        if step == 4:
            net.requires_grad_(True)  # the hooks are put on anew
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), labels)
        loss.backward()
        captured.append(len(optimizer._fisher.capture.captured))
        optimizer.step()
        losses.append(loss.item())
    return losses, captured


@pytest.fixture(scope="module")
def uncompiled() -> tuple[list[float], list[int]]:
    return train("uncompiled")


@pytest.mark.parametrize("way", ["before", "after", "in place"])
def test_a_compiled_model_gives_the_same_losses(way: str, uncompiled: tuple[list[float], list[int]]) -> None:
    losses, captured = train(way)
    assert counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert not counters["recompile_limit"], "no layer's name costs a compilation"
    assert counters["frames"]["total"] < NUM_LAYERS
    assert captured == [NUM_LAYERS + 1] * 4 + [NUM_LAYERS + 2] * 4
    assert (losses, captured) == (pytest.approx(uncompiled[0], rel=0, abs=1e-5), uncompiled[1])
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_that_is_compiled_long_after_the_optimizer_was_made(run_python: Callable[..., Any]) -> None:
    """In a process of its own, where nothing has loaded the compiler before."""
    finished = run_python(["-c", LATE], timeout=120)
    assert finished.returncode == 0, finished.stderr


LATE = """
import sys, torch
from kfac_dist import KFAC, create_communicator
def train(compiles):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(10)])
    optimizer = KFAC(net, create_communicator(), lr=0.1, damping=0.1)
    losses = []
    for step in range(4):
        if compiles and step == 2:
            assert "torch._dynamo" not in sys.modules
            net.compile()
        optimizer.zero_grad()
        loss = net(torch.linspace(-1, 1, 80).view(10, 8)).square().mean()
        loss.backward()
        assert len(optimizer._fisher.capture.captured) == 10
        optimizer.step()
        losses.append(loss.item())
    return losses
plain, compiled = train(False), train(True)
torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] > 0 and not counters["recompile_limit"], counters
assert counters["frames"]["total"] < 10, counters
"""

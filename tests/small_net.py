"""A small network in float64, batches for it, and training steps: what the optimizer's tests share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, create_communicator


def make_net(seed: int = 0) -> nn.Sequential:
    """Convolution, BatchNorm, in-place activation, linear layer: parameters 0–1, 2–3 and 4–5."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(75, 4)
    ).double()


def make_batch(step: int = 0, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(samples, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (samples,), generator=generator)


def make_kfac(model: nn.Module, **settings: Any) -> KFAC:
    return KFAC(model, create_communicator("reduce"), **settings)


def backward(model: nn.Module, step: int = 0) -> Tensor:
    x, y = make_batch(step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def running(optimizer: KFAC) -> dict[str, Tensor]:
    """The running Fisher by "block.matrix"."""
    blocks = optimizer.state_dict()["kfac"]["blocks"]
    return {f"{name}.{matrix}": value for name, block in blocks.items() for matrix, value in block["running"].items()}


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {number} differs by up to {(a - e).abs().max():.3e}"

"""Sending gradients during the backward pass is sending them after it, whatever each rank's pass is; under torchrun."""

import contextlib

import torch
from torch import Tensor, nn

from kfac_dist import KFAC, SGD, LossScaler, create_communicator
from kfac_dist.errors import AgreedInputError
from kfac_dist.optim import gradient_messages
from kfac_dist.optim.base import DistributedOptimizer

gradient_messages.MESSAGE_BYTES, gradient_messages.MESSAGE_BYTES_PER_RANK = 1, 0  # a message for each layer
communicator = create_communicator()
STEPS = 8


class Branches(nn.Module):
    """Each call takes one of two branches, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk = nn.Linear(6, 6).double()
        self.left, self.right = (nn.Linear(6, 3).double() for _ in range(2))

    def forward(self, x: Tensor, branches: str) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        outputs = [getattr(self, name)(hidden) for name in branches.split("+")]
        return torch.stack(outputs).sum(dim=0)


def optimizer_of(kind: str, net: nn.Module, scaler: LossScaler) -> DistributedOptimizer:
    if kind == "sgd":
        return SGD(net, communicator, lr=0.05, momentum=0.9, loss_scaler=scaler, max_grad_norm=1.0)
    return KFAC(net, communicator, lr=0.05, damping=0.1, refresh=2, loss_scaler=scaler, max_grad_norm=1.0)


def train(kind: str, overlap: bool) -> tuple[list[Tensor], int]:
    """Weights after `STEPS` steps, and how many messages were under way before a backward pass had ended."""
    net, scaler = Branches(), LossScaler(scale=4.0)
    optimizer = optimizer_of(kind, net, scaler)
    early: list[int] = []
    net.trunk.bias.register_hook(lambda gradient: early.append(len(optimizer._messages._pending)))
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + communicator.rank)
        others = ["left", "right", "left+right"][(step + communicator.rank) % 3]
        for is_last, branches in enumerate(("left+right", others)):
            x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            loss = net(x, branches).square().mean() / 2
            if step == 3 and communicator.rank == 1:
                loss = loss * float("inf")
            with optimizer.overlap_backward() if overlap and is_last else contextlib.nullcontext():
                scaler.scale_loss(loss).backward()
        if step == 6 and communicator.rank == 1:
            optimizer.zero_grad()  # as after an exception that was this rank's alone
        if step == 5:
            optimizer.skip_step()
        else:
            optimizer.step()
        assert optimizer.report.skipped == (step in (3, 5)), step
    return [parameter.detach() for parameter in net.parameters()], max(early)


def refusal(kind: str) -> str:
    """What is said where one rank has frozen a layer."""
    net = Branches()
    optimizer = optimizer_of(kind, net, LossScaler())
    net.left.requires_grad_(communicator.rank == 0)
    try:
        with optimizer.overlap_backward():
            net(torch.ones(2, 6, dtype=torch.float64), "left+right").sum().backward()
    except AgreedInputError as error:
        return str(error)
    return ""


for kind in ("kfac", "sgd"):
    assert "freeze and unfreeze (requires_grad) on every rank alike" in refusal(kind)
    (after, none), (during, some) = train(kind, overlap=False), train(kind, overlap=True)
    assert none == 0
    assert some >= 1
    assert all(map(torch.equal, during, after)), kind
    communicator.print_once(f"{kind}: sent early, equal")

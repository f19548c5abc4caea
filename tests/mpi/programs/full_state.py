"""Goes on from `KFAC.full_state_dict()` on other ranks.

full_state.py FOLDER    on 2 ranks: FOLDER/state-0 and state-1 after 3 of 6 steps, weights-2 after all; on 1 rank: goes
on from state-1 and leaves weights-1
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import KFAC, create_communicator
from kfac_dist.communicator import Communicator, launch
from kfac_dist.tensors.nested_state import decode, encode

NUM_SLOTS = 2


def make(communicator: Communicator) -> tuple[nn.Sequential, KFAC]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3)
    )
    net = net.double()
    return net, KFAC(net, communicator, lr=0.1, damping=0.1, ema_decay=0.8, refresh=2, batchnorm="full")


def train(net: nn.Module, optimizer: KFAC, communicator: Communicator, first: int, last: int) -> None:
    slots = range(communicator.rank, NUM_SLOTS, communicator.size)
    for step in range(first, last):
        optimizer.zero_grad()
        for slot in slots:
            generator = torch.Generator().manual_seed(100 * step + slot)
            images = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
            labels = torch.randint(3, (6,), generator=generator)
            (F.cross_entropy(net(images), labels) / len(slots)).backward()
        optimizer.step()


def main() -> int:
    folder = Path(sys.argv[1])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    net, optimizer = make(communicator)
    saved: dict[str, Any]
    if communicator.size == 1:
        saved = decode((folder / "state-1").read_bytes())  # what rank 1 of 2 saved
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(net, optimizer, communicator, 3, 6)
    else:
        train(net, optimizer, communicator, 0, 3)
        own = optimizer.state_dict()["kfac"]["blocks"]
        saved = {"model": net.state_dict(), "optimizer": optimizer.full_state_dict()}
        assert len(own) < len(saved["optimizer"]["kfac"]["blocks"]) == 3
        message = encode(saved)
        (folder / f"state-{communicator.rank}").write_bytes(message)
        train(net, optimizer, communicator, 3, 6)
        # Each rank goes on from the other's.
        other_net, other = make(communicator)
        communicator.barrier()
        others = decode((folder / f"state-{1 - communicator.rank}").read_bytes())
        other_net.load_state_dict(others["model"])
        other.load_state_dict(others["optimizer"])
        train(other_net, other, communicator, 3, 6)
        for name, value in net.state_dict().items():
            assert torch.equal(value, other_net.state_dict()[name]), name
    if communicator.is_main:
        (folder / f"weights-{communicator.size}").write_bytes(encode(net.state_dict()))
    return 0


if __name__ == "__main__":
    launch.run(main)

"""What users do between steps, in random order: freeze, save, load, skip, drop and accumulate.

random_sequences.py FILE    → FILE with rank 0's weights after each sequence, which must not depend on the ranks
"""

import copy
import random
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, LossScaler, create_communicator
from kfac_dist.communicator import Communicator, launch
from kfac_dist.curvature.refresh_schedule import AdaptiveRefresh

NUM_SEQUENCES = 20
LENGTH = 14
NUM_SAMPLES = 24
LAYERS = [0, 2, 4, 5, 7]  # those with parameters
DEEDS = ["accumulate", "step overlapped", "freeze", "freeze before step", "unfreeze", "save", "load", "make anew"]
DEEDS += ["skip", "drop", "zero", "overflow"]


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten(), nn.LayerNorm(27),
        nn.Linear(27, 6), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip


class Sequence:
    """A model and its optimizer, and what is done to them."""

    def __init__(self, seed: int, communicator: Communicator) -> None:
        self.choices = random.Random(seed)
        self.communicator = communicator
        self.settings: dict[str, Any] = {
            "ema_decay": self.choices.choice([None, 0.5]),
            "max_grad_norm": self.choices.choice([None, 0.5]),
            "weight_rescaling": self.choices.choice(["off", "always"]),
        }
        self.refresh = self.choices.choice([1, 2, 3, "adaptive"])
        self.scales_loss = self.choices.random() < 0.3
        self.saved: tuple[dict[str, Any], dict[str, Any], list[bool]] | None = None
        self.make()

    def make(self) -> None:
        self.net = make_net()
        self.scaler = LossScaler(growth_interval=3) if self.scales_loss else None
        refresh = AdaptiveRefresh(threshold=0.3, max_interval=4) if self.refresh == "adaptive" else self.refresh
        self.optimizer = KFAC(
            self.net, self.communicator, lr=0.1, damping=0.1, weight_decay=1e-3, refresh=refresh,
            loss_scaler=self.scaler, **self.settings,
        )  # fmt: skip

    def backward(self, num_passes: int = 1) -> None:
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(NUM_SAMPLES, 2, 5, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (NUM_SAMPLES,), generator=generator)
        of_rank = slice(self.communicator.rank, None, self.communicator.size)
        for x, y in zip(images[of_rank].chunk(num_passes), labels[of_rank].chunk(num_passes), strict=True):
            loss = F.cross_entropy(self.net(x), y) / num_passes
            (self.scaler.scale_loss(loss) if self.scaler else loss).backward()

    def step(self, num_passes: int = 1) -> None:
        self.optimizer.zero_grad()
        self.backward(num_passes)
        self.optimizer.step()

    def do(self, deed: str) -> None:
        layer = self.net[self.choices.choice(LAYERS)]
        match deed:
            case "step":
                self.step()
            case "accumulate":
                self.step(num_passes=2)
            case "step overlapped":
                self.optimizer.zero_grad()
                with self.optimizer.overlap_backward():
                    self.backward()
                self.optimizer.step()
            case "freeze":
                layer.requires_grad_(False)
            case "freeze before step":
                self.optimizer.zero_grad()
                self.backward()
                layer.requires_grad_(False)
                self.optimizer.step()
                layer.requires_grad_(True)
            case "unfreeze":
                self.net.requires_grad_(True)
            case "save":
                trained = [parameter.requires_grad for parameter in self.net.parameters()]
                self.saved = copy.deepcopy((self.net.state_dict(), self.optimizer.full_state_dict(), trained))
            case "load" | "make anew" if self.saved is not None:
                self.load(is_new=deed == "make anew")
            case "skip":
                self.optimizer.zero_grad()
                self.backward()
                self.optimizer.skip_step()
            case "drop":
                self.backward()
                self.optimizer.zero_grad()
            case "zero":
                self.backward()
                self.net.zero_grad()
            case "overflow":
                self.optimizer.zero_grad()
                self.backward()
                gradient = self.net[7].weight.grad
                if self.scaler and gradient is not None and self.communicator.rank == self.communicator.size - 1:
                    gradient[0, 0] = torch.inf
                self.optimizer.step()
        if not any(parameter.requires_grad for parameter in self.net.parameters()):
            self.net.requires_grad_(True)

    def load(self, is_new: bool) -> None:
        assert self.saved is not None
        weights, state, trained = copy.deepcopy(self.saved)
        if is_new:
            self.optimizer.close()
            self.make()
        self.net.load_state_dict(weights)
        for parameter, is_trained in zip(self.net.parameters(), trained, strict=True):
            parameter.requires_grad_(is_trained)
        self.optimizer.load_state_dict(state)


def run(seed: int, communicator: Communicator) -> Tensor:
    sequence = Sequence(seed, communicator)
    for _ in range(LENGTH):
        sequence.do(sequence.choices.choice(["step"] * 5 + DEEDS))
    sequence.optimizer.close()
    return torch.cat([parameter.detach().flatten() for parameter in sequence.net.parameters()])


def main() -> int:
    (file,) = sys.argv[1:]
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    weights = torch.stack([run(seed, communicator) for seed in range(NUM_SEQUENCES)])
    if communicator.is_main:
        torch.save(weights, file)
    return 0


if __name__ == "__main__":
    launch.run(main)

"""Freezes and unfreezes parameters in mid-training over six slots an iteration, shared out over the ranks.

freezing.py FOLDER CASE…    → FOLDER/CASE.pt with rank 0's weights; a case is OPTIMIZER-PRECISION, of kfac, sgd and
fp64, bf16
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, SGD, create_communicator
from kfac_dist.communicator import Communicator, launch

NUM_SLOTS = 6
DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16}
# By iteration, what is frozen from then on, as prefixes of parameters' names; the last is all that one of three owns.
PHASES: dict[int, tuple[str, ...]] = {
    0: ("0.", "5."), 3: (), 6: ("0.", "2.bias"), 9: ("2.", "7."), 12: ("0.", "7.")
}  # fmt: skip


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=True), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3),
    )  # fmt: skip


def make_slot(iteration: int, slot: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * iteration + slot)
    images = torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (4,), generator=generator)


def train(case: str, communicator: Communicator) -> dict[str, Tensor]:
    optimizer_name, precision = case.split("-")
    dtype = DTYPES[precision]
    model = make_net().to(dtype)
    slots = range(communicator.rank, NUM_SLOTS, communicator.size)
    optimizer: KFAC | SGD
    if optimizer_name == "kfac":
        optimizer = KFAC(model, communicator, lr=0.05, damping=0.1, ema_decay=0.8, refresh=2, weight_decay=1e-3)
    else:
        optimizer = SGD(model, communicator, lr=0.05, weight_decay=1e-3)
    for iteration in range(15):
        if iteration in PHASES:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(PHASES[iteration] or ("none",)))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad(set_to_none=False)  # what is left of a gradient must not move what was frozen since
        for slot in slots:
            images, labels = make_slot(iteration, slot)
            (F.cross_entropy(model(images.to(dtype)), labels) / len(slots)).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == parameter.requires_grad, f"{case}, iteration {iteration}: {name} moved: {moved}"
            first = communicator.broadcast_(parameter.detach().double())
            assert torch.equal(parameter.double(), first), f"{case}, iteration {iteration}: ranks differ in {name}"
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def main() -> int:
    folder, *cases = sys.argv[1:]
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    for case in cases:
        weights = train(case, communicator)
        if communicator.is_main:
            torch.save(weights, Path(folder) / f"{case}.pt")
    return 0


if __name__ == "__main__":
    launch.run(main)

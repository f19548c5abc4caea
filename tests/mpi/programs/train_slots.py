"""Trains a small network over eight slots an iteration, shared out over the ranks; rank 0 saves the parameters.

train_slots.py FOLDER DEVICE BACKEND CASE…    → FOLDER/CASE.pt; a case is PRECISION, PRECISION-on-WIRE or overflowing

In fp16 the last rank's gradients overflow once, in iteration 3: every rank must skip that update and keep everything.
"overflowing" is fp16 with a scale that is too large at first.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import KFAC, LossScaler, create_communicator
from kfac_dist.communicator import Communicator, launch
from kfac_dist.models import SlotwiseBatchNorm
from kfac_dist.optim.kfac import CommDtypes
from kfac_dist.training.precision import HALF_DTYPES, Precision

NUM_SLOTS, NUM_ITERATIONS, OVERFLOW = 8, 8, 3


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def make_slot(iteration: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * iteration + slot)
    labels = torch.randint(5, (16,), generator=generator)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64) + labels[:, None, None, None] / 3
    return images, labels


def state(model: nn.Module, optimizer: KFAC) -> list[torch.Tensor]:
    """Copies of weights, BatchNorm statistics, momentum and running Fisher."""
    saved = optimizer.state_dict()
    tensors = [*model.state_dict().values(), *(entry["momentum_buffer"] for entry in saved["state"].values())]
    for block in saved["kfac"]["blocks"].values():
        tensors += [*block["running"].values(), *block["solvers"].values()]
    return [tensor.clone() for tensor in tensors]


def train(case: str, device: torch.device, communicator: Communicator) -> tuple[dict[str, torch.Tensor], list[float]]:
    is_overflowing = case == "overflowing"
    precision_name, _, wire_name = ("fp16" if is_overflowing else case).partition("-on-")
    precision, comm_dtype = Precision(precision_name), HALF_DTYPES.get(wire_name)
    rank, size = communicator.rank, communicator.size
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = make_net().to(device, precision.weights, memory_format=memory_format)
    slots = range(rank, NUM_SLOTS, size)
    batchnorm = SlotwiseBatchNorm(model)
    scaler = None
    if precision.needs_loss_scale:
        scaler = LossScaler(2.0**22 if is_overflowing else 2.0**16, num_losses=len(slots))
    optimizer = KFAC(
        model, communicator, lr=0.05, damping=0.1, ema_decay=0.8, refresh=2, accumulation_steps=len(slots),
        weight_rescaling="always", loss_scaler=scaler, comm_dtypes=CommDtypes(comm_dtype, comm_dtype),
    )  # fmt: skip
    scales = []
    for iteration in range(NUM_ITERATIONS):
        optimizer.zero_grad()
        before = state(model, optimizer)
        for index, slot in enumerate(slots):
            batchnorm.before_slot(index, len(slots))
            images, labels = make_slot(iteration, slot)
            images = images.to(device, precision.weights, memory_format=memory_format)
            with precision.autocast(device):
                loss = F.cross_entropy(model(images), labels.to(device)) / len(slots)
            (loss if scaler is None else scaler.scale_loss(loss)).backward()
        running_before = [buffer.clone() for buffer in batchnorm.running_buffers()]
        injected = scaler is not None and iteration == OVERFLOW and not is_overflowing
        if injected and rank == size - 1:
            next(model.parameters()).grad[0, 0, 0, 0] = float("inf")  # channels-last on a GPU: it has no flat view
        optimizer.step()
        if injected:
            for buffer, kept in zip(batchnorm.running_buffers(), running_before, strict=True):
                assert torch.equal(buffer, kept)
            num_buffers = len(model.state_dict()) - len(list(model.parameters()))
            changed = sum(not torch.equal(new, old) for new, old in zip(state(model, optimizer), before, strict=True))
            assert changed <= num_buffers, f"rank {rank}: {changed} tensors changed"  # the forward moved BatchNorm's
            assert scaler.num_overflows == 1
            assert scaler.scale == 2.0**15
        if scaler is not None:
            scales.append(scaler.scale)
    if scaler is not None and not is_overflowing:
        assert scaler.num_overflows == 1, f"{scaler.num_overflows} overflows"
    for buffer in batchnorm.running_buffers():
        communicator.all_reduce_(buffer, "mean")
    tensors = {name: value.detach().double().cpu() for name, value in model.state_dict().items() if "num_b" not in name}
    for name, value in tensors.items():
        assert torch.equal(value, communicator.broadcast_(value.clone())), f"ranks differ in {name}"
    return tensors, scales


def main() -> int:
    folder, device_name, backend, *cases = sys.argv[1:]
    device = torch.device(device_name)
    torch.backends.cudnn.allow_tf32 = False
    communicator = create_communicator("reduce", backend, device)
    for case in cases:
        tensors, scales = train(case, device, communicator)
        saved = {"tensors": tensors, "scales": scales, "description": communicator.description}
        if communicator.is_main:
            torch.save(saved, Path(folder) / f"{case}.pt")
    return 0


if __name__ == "__main__":
    launch.run(main)

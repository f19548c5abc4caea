"""A learning-rate schedule, a checkpoint, and a run that goes on from it exactly as if it had not been cut.

scheduler_and_resume.py FILE STEPS    trains up to this number of steps; goes on from FILE if it exists, and saves it
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_dist import KFAC, create_communicator

communicator = create_communicator()
# Each rank saves its own file: KFAC's state holds the part of the Fisher that this rank owns.
file = Path(f"{sys.argv[1]}.rank{communicator.rank}")
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
)
optimizer = KFAC(model, communicator, lr=0.03, damping=0.03, ema_decay=0.9, refresh=3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
first = 0

if file.exists():
    saved = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    first = saved["step"]

for step in range(first, int(sys.argv[2])):
    # Drawn from the step, so that a resumed run sees the batches that the uninterrupted one would have.
    generator = torch.Generator().manual_seed(step)
    batch = torch.randperm(len(images), generator=generator)[:128][communicator.rank :: communicator.size]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step == first:
        communicator.print_once(f"step {step}: loss {loss.item():.4f}")

torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": int(sys.argv[2])}, file)
communicator.print_once(f"step {step}: loss {loss.item():.4f}, learning rate {scheduler.get_last_lr()[0]:.5f}")

"""Several backward passes for each step, and a gradient clipped over all ranks: both are K-FAC's own affair."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_dist import KFAC, create_communicator

NUM_PASSES, MAX_NORM = 4, 0.5

communicator = create_communicator()
torch.manual_seed(communicator.rank)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)[:1792] / 16
labels = torch.tensor(digits.target)[:1792]
images, labels = (part[communicator.rank :: communicator.size] for part in (images, labels))

model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
# Clipped is the gradient averaged over passes and ranks. torch.nn.utils.clip_grad_norm_ sees one rank's gradient only.
optimizer = KFAC(model, communicator, lr=0.1, damping=0.1, max_grad_norm=MAX_NORM, accumulation_steps=NUM_PASSES)

losses = []
for _ in range(5):  # epochs
    for batch in torch.randperm(len(images)).split(256 // communicator.size):
        optimizer.zero_grad()
        total = 0.0
        parts = batch.chunk(NUM_PASSES)
        for number, part in enumerate(parts, start=1):
            loss = F.cross_entropy(model(images[part]), labels[part]) / NUM_PASSES  # as always when accumulating
            # The last pass completes the gradients: over NCCL or gloo they travel while it still computes.
            with optimizer.overlap_backward() if number == len(parts) else nullcontext():
                loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
communicator.print_once(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps of {NUM_PASSES} passes")

"""Fine-tune torchvision's ResNet-18 on the digits with K-FAC: the last layer alone first, then all of it.

fine_tuning.py [WEIGHTS]    for example DEFAULT, which torchvision downloads; without, the trunk starts random
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import resnet18

from kfac_dist import KFAC, create_communicator

communicator = create_communicator()
torch.manual_seed(communicator.rank)  # another order on each rank; KFAC gives every rank rank 0's weights
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:512, None].repeat(1, 3, 1, 1) / 16
images = F.interpolate(images, size=32)
labels = torch.tensor(digits.target)[:512]

model = resnet18(weights=sys.argv[1] if len(sys.argv) > 1 else None)
model.fc = torch.nn.Linear(model.fc.in_features, 10)
model.requires_grad_(False)
model.fc.requires_grad_(True)
# Given all parameters, KFAC trains those that are not frozen, and follows when that changes.
optimizer = KFAC(model, communicator, lr=0.1, momentum=0.9, damping=0.3, refresh=3)
communicator.print_once("\n".join(optimizer.describe()))


def train(num_steps: int) -> None:
    """Train on random batches, and print the mean losses of the first and the last two."""
    losses = []
    for _ in range(num_steps):
        batch = torch.randperm(len(images))[: 64 // communicator.size]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    communicator.print_once(f"loss {first:.3f} -> {last:.3f} over {num_steps} steps")


train(5)  # the last layer
model.requires_grad_(True)
optimizer.param_groups[0]["lr"] = 0.003  # as a scheduler would; read at every step
train(6)  # all of it
communicator.print_once("\n".join(optimizer.describe()))

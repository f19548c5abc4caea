"""Forward and backward in bfloat16 by autocast; K-FAC keeps weights, factors and inverses in fp32.

fp16 also needs its loss scaled: scaler = LossScaler(), KFAC(…, loss_scaler=scaler), scaler.scale_loss(loss).backward().
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_dist import KFAC, create_communicator, local_device

device = local_device()  # this rank's GPU, or the CPU
communicator = create_communicator(device=device)
torch.manual_seed(communicator.rank)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:1792, None] / 16
labels = torch.tensor(digits.target)[:1792]
images, labels = (part[communicator.rank :: communicator.size].to(device) for part in (images, labels))

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
).to(device)
optimizer = KFAC(model, communicator, lr=0.03, momentum=0.9, damping=0.03)

for epoch in range(4):
    total = 0.0
    for batch in torch.randperm(len(images)).split(128 // communicator.size):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()  # outside of autocast, as torch asks for
        optimizer.step()
        total += loss.item() * len(batch) / len(images)
    communicator.print_once(f"epoch {epoch + 1}: loss {total:.3f}")
assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

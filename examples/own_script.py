"""Train a network on the digits with K-FAC, without the trainer: on one rank, or as many as mpirun starts."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kfac_dist import KFAC, create_communicator

communicator = create_communicator()  # one rank, or as many as mpirun started
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:1792, None] / 16
labels = torch.tensor(digits.target)[:1792]
images, labels = (part[communicator.rank :: communicator.size] for part in (images, labels))

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
)
optimizer = KFAC(model, communicator, lr=0.03, momentum=0.9, damping=0.03)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

for _ in range(8):  # epochs
    for batch in torch.randperm(len(images)).split(128 // communicator.size):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()  # averages over ranks: no DistributedDataParallel
    scheduler.step()

with torch.no_grad():
    accuracy = (model.eval()(images).argmax(1) == labels).double().mean()
communicator.print_once(f"accuracy on rank 0's share: {100 * accuracy:.1f} %")

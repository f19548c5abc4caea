"""K-FAC in a script that torchrun starts: the model without DistributedDataParallel, the rest as it was.

torchrun --nproc-per-node 2 torch_distributed.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_dist import KFAC, create_communicator, local_device

device = local_device()  # this rank's GPU, or the CPU
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
communicator = create_communicator(backend="torch", device=device)  # over the process group just made

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:1792, None] / 16
dataset = TensorDataset(images, torch.tensor(digits.target)[:1792])
sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=128 // dist.get_world_size(), sampler=sampler, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
).to(device)
optimizer = KFAC(model, communicator, lr=0.03, momentum=0.9, damping=0.03)  # gives every rank rank 0's weights

for epoch in range(4):
    sampler.set_epoch(epoch)
    total = torch.zeros((), device=device)
    for batch in loader:
        inputs, targets = (part.to(device) for part in batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        with optimizer.overlap_backward():  # gradients travel while the backward pass computes further ones
            loss.backward()
        optimizer.step()  # averages gradients and factors over the ranks
        total += loss.detach() / len(loader)
    dist.all_reduce(total)
    communicator.print_once(f"epoch {epoch + 1}: loss {total.item() / dist.get_world_size():.3f}")

dist.destroy_process_group()

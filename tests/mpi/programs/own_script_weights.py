"""A script of one's own that trains with K-FAC, started by torchrun, mpirun or nothing; arguments: FOLDER WAY.

plain     nothing but KFAC
module    a process group and DistributedDataParallel of the script's own; the forward pass goes around the latter
no_sync   the same, and the forward pass goes through it within no_sync
synced    the same, and it averages the gradients, too
overlap   nothing but KFAC, which sends each layer's gradients during the backward pass

Each rank leaves FOLDER/<number of ranks>-<rank>.pt. The data are in float64, so that only an error makes a difference.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC, create_communicator
from kfac_dist.optim import gradient_messages

folder, way = Path(sys.argv[1]), sys.argv[2]
alone = way in ("plain", "overlap")
gradient_messages.MESSAGE_BYTES, gradient_messages.MESSAGE_BYTES_PER_RANK = 1, 0
if not alone:
    dist.init_process_group("gloo")
communicator = create_communicator()
torch.set_default_dtype(torch.float64)
torch.manual_seed(communicator.rank)  # KFAC, and DistributedDataParallel, take rank 0's weights
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
forward = model if alone else DistributedDataParallel(model)
optimizer = KFAC(model, communicator, lr=0.05, momentum=0.9, damping=0.01)
generator = torch.Generator().manual_seed(1)
for _ in range(6):
    images, labels = torch.randn(24, 1, 6, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    images, labels = (part[communicator.rank :: communicator.size] for part in (images, labels))
    optimizer.zero_grad()
    with forward.no_sync() if way == "no_sync" else contextlib.nullcontext():
        outputs = model(images) if way == "module" else forward(images)
        with optimizer.overlap_backward() if way == "overlap" else contextlib.nullcontext():
            F.cross_entropy(outputs, labels).backward()
    optimizer.step()
torch.save(model.state_dict(), folder / f"{communicator.size}-{communicator.rank}.pt")
communicator.print_once(f"{communicator.size} ranks: {communicator.description}")
if not alone:
    dist.destroy_process_group()

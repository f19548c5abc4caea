"""A ReduceScatterV and an AllGatherV of uneven segments, one of them empty, on three ranks with a GPU each."""

import torch

from kfac_dist import create_communicator, local_device

device = local_device()
communicator = create_communicator()
values = torch.arange(10.0, device=device)
communicator.reduce_scatter_v(values, [3, 0, 7])
communicator.all_gather_v(values, [3, 0, 7])
assert values.cpu().tolist() == torch.arange(10.0).tolist()

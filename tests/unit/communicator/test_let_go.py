"""A process group that the program has destroyed ends before the interpreter does."""

from pathlib import Path

import torch
import torch.distributed as dist

from kfac_dist.communicator import connect, create_communicator


def test_a_communicator_gives_up_its_group_at_exit(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    communicator = create_communicator(backend="torch", device=torch.device("cpu"))
    dist.destroy_process_group()
    held = [name for name, value in vars(communicator).items() if isinstance(value, dist.ProcessGroup)]
    assert len(held) == 1
    connect._let_go()
    assert not hasattr(communicator, held[0])
    connect._let_go()  # as often as it is registered

"""Resumes a run and compares what each rank then has with what is in the checkpoint's files, bit for bit.

reown.py RUN CONFIG [key=value …]    prints the blocks that this rank owns
"""

import sys
from pathlib import Path

import torch

from kfac_dist.checkpoints.manifest import read_manifest
from kfac_dist.checkpoints.shard import ShardReader
from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import load_config
from kfac_dist.tensors.nested_state import flatten
from kfac_dist.training.run_state import take_state
from kfac_dist.training.trainer import Trainer


def main() -> int:
    run = Path(sys.argv[1])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    trainer = Trainer(load_config(sys.argv[2], sys.argv[3:]), communicator, torch.device("cpu"))
    assert trainer.resume(run)
    state = take_state(trainer)
    newest = max((run / "checkpoints").glob("iteration-*"))
    place = {item: name for name, record in read_manifest(newest).files.items() for item in record.items}
    assert state.blocks
    items = {f"block/{name}": block for name, block in state.blocks.items()}
    items |= {f"mixup/{slot}": kept for slot, kept in state.mixup.items()}
    for item, value in items.items():
        tensors, tree = flatten(value)
        saved, saved_tree = flatten(ShardReader(newest / place[item]).read(item))
        assert tree == saved_tree, item
        assert list(tensors) == list(saved)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved[name]), f"{item} {name}"
    print(f"rank {communicator.rank} owns {sorted(state.blocks)}")
    return 0


if __name__ == "__main__":
    launch.run(main)

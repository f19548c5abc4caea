"""Seconds that training waits for a checkpoint, seconds until it is on the disk, and its size.

[mpirun -n P] python benchmarks/checkpoint.py FOLDER CONFIG.yaml [key=value …]    (two iterations, then three saves)
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from kfac_dist.checkpoints.manifest import Manifest
from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import load_config
from kfac_dist.devices import choose_device
from kfac_dist.training.checkpoint import Checkpointer, code_version, now
from kfac_dist.training.run_state import take_state
from kfac_dist.training.trainer import Trainer


def main() -> int:
    """Run one rank."""
    folder = Path(sys.argv[1])
    config = load_config(sys.argv[2], [*sys.argv[3:], f"run.output_dir={folder}"])
    setup = create_communicator("reduce", device=torch.device("cpu"))
    device = choose_device(config.run.device, setup.local_rank)
    communicator = create_communicator("reduce", config.communication.backend, device)
    trainer = Trainer(config, communicator, device)
    trainer.schedules.num_iterations = 2
    trainer.train()
    checkpointer = Checkpointer(folder / "measured", communicator, keep=1, keep_best=False)
    waited, written = [], []
    for number in range(3):
        manifest = Manifest(number, communicator.size, None, config.to_yaml(), {}, code_version(), now(), {})
        communicator.barrier()
        start = time.perf_counter()
        first_owned = trainer.optimizer.owned_blocks(first_only=True)
        checkpointer.save(take_state(trainer), first_owned, manifest, wait=False)
        waited.append(time.perf_counter() - start)
        assert checkpointer.finish(), "a checkpoint could not be written"
        written.append(time.perf_counter() - start)
    if communicator.is_main:
        (newest,) = (folder / "measured" / "checkpoints").iterdir()
        sizes = {path.name: os.stat(path).st_size for path in newest.iterdir()}
        told = {
            "ranks": communicator.size,
            "device": str(device),
            "seconds_waited": waited,
            "seconds_until_written": written,
            "model_bytes": sizes["model.safetensors"],
            "checkpoint_bytes": sum(sizes.values()),
        }
        print(json.dumps(told))
    return 0


if __name__ == "__main__":
    launch.run(main)

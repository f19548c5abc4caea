"""Trains, with a checkpoint and an evaluation every epoch, and notes what each iteration leaves behind.

soak.py CONFIG EPOCHS FOLDER    writes FOLDER/rank-N.json: [[open files, threads, resident bytes], …]
"""

import json
import os
import sys
import threading
from pathlib import Path

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import load_config
from kfac_dist.training.trainer import Trainer


def main() -> int:
    config_file, epochs, folder = sys.argv[1:]
    length = (f"train.epochs={epochs}", f"schedule.end_epoch={epochs}", "train.evaluate_every=1")
    settings = ("augment={pad_crop: 1, mixup_alpha: 0.4}", "kfac.ema_decay=0.9", "checkpoint={every_epochs: 1}")
    config = load_config(config_file, [*length, *settings, f"run.output_dir={folder}"])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    found = []
    train_iteration = Trainer._train_iteration

    def look(self: Trainer, *arguments: object) -> object:
        result = train_iteration(self, *arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append((len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE")))
        return result

    Trainer._train_iteration = look  # type: ignore[method-assign]
    Trainer(config, communicator, torch.device("cpu")).train()
    Path(folder, f"rank-{communicator.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    launch.run(main)

"""Trains imagenet.yaml: `train_imagenet.py FOLDER dotted.key=value…`; rank 0 writes FOLDER/parameters.pt."""

import sys
from pathlib import Path

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import load_config
from kfac_dist.training.trainer import Trainer


def main() -> int:
    folder = Path(sys.argv[1])
    config = load_config(Path(__file__).with_name("imagenet.yaml"), [f"run.output_dir={folder}", *sys.argv[2:]])
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    trainer = Trainer(config, communicator, torch.device("cpu"))
    trainer.train()
    if communicator.is_main:
        torch.save({name: value.detach() for name, value in trainer.model.named_parameters()}, folder / "parameters.pt")
    return 0


launch.run(main)

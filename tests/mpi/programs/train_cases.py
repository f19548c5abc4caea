"""Trains the named cases one after the other; rank 0 saves each one's parameters, metrics and bytes.

train_cases.py FOLDER CASE…       → FOLDER/CASE.pt and FOLDER/CASE/, the run's directory
"""

import sys
from pathlib import Path

import torch

from kfac_dist.communicator import create_communicator, launch
from kfac_dist.config.load import load_config
from kfac_dist.training.trainer import Trainer

BASE = Path(__file__).with_name("world_size.yaml")

# 2 epochs of 1,438 images are 20 iterations of 144, in 12 slots of 12: 12, 6, 4 or 3 slots a rank on 1 to 4 ranks.
CASES = {
    "kfac": [],
    # Damped strongly: rounding decides which of several equal pixels (of the digits' background) max pooling takes,
    # which changes G; at damping 0.025 → 0.0025 that grows to 2e-3 within 20 iterations, here to 2e-4 at most.
    "kfac_fp32": ["train.precision=fp32", "kfac.damping.initial=0.25", "kfac.damping.target=0.25"],
    "kfac_variants": [
        "kfac.ema_decay=0.9",
        "kfac.sample_fraction=0.4",
        "kfac.refresh={schedule: every, interval: 3}",
        "kfac.monitor.diff=true",
        "kfac.batchnorm=full",
        "weight_rescaling=cap",
        "communication.reduce_scatter=native",
    ],
    "adaptive": [
        "kfac.ema_decay=0.8",
        "kfac.refresh={schedule: adaptive, threshold: 0.3, max_interval: 6}",
        "kfac.monitor={diff: true, spectrum: true}",
    ],
    "sgd": [
        "optimizer.name=sgd",
        "optimizer.learning_rate=0.05",
        "optimizer.weight_decay=0.0005",
        "kfac=null",
        "weight_rescaling=off",
        "communication.reduce_scatter=ireduce",
    ],
    "one_cycle": [
        "optimizer={name: sgd, learning_rate: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.01,"
        " decayed: weights}",
        "schedule={kind: one_cycle, end_epoch: 2}",
        "kfac=null",
        "weight_rescaling=off",
    ],
    # Muon orthogonalises in bfloat16, where a gradient that rounds the other way changes 1 of 256: in fp64 none does.
    "muon": ["optimizer={name: muon, learning_rate: 0.1, momentum: 0.6}", "kfac=null"],
    "adamw": ["optimizer={name: adamw, learning_rate: 0.01, momentum: 0.9, weight_decay: 0.01}", "kfac=null"],
    "lars": [
        "optimizer={name: lars, learning_rate: 4, momentum: 0.5, weight_decay: 0.001}",
        "kfac=null",
        "weight_rescaling=off",
    ],
    # 16 slots of 12 on 8 ranks, which are more than the 5 layers; 20 iterations.
    "redundant_owners": ["batch.global_size=192", "train.epochs=2.6"],
}


def main() -> int:
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        config = load_config(BASE, [f"run.name={case}", f"run.output_dir={folder}", *CASES[case]])
        communicator = create_communicator(config.communication.reduce_scatter, "mpi", torch.device("cpu"))
        trainer = Trainer(config, communicator, torch.device("cpu"))
        result = trainer.train()
        assert result.directory == folder / case
        parameters = {name: value.detach().double() for name, value in trainer.model.named_parameters()}
        for name, value in parameters.items():
            assert torch.equal(value, communicator.broadcast_(value.clone())), f"{case}: ranks differ in {name}"
        buffers = {
            name: value.double()
            for name, value in trainer.model.named_buffers()
            if not name.endswith("num_batches_tracked")  # counts the slots of a rank
        }
        if communicator.is_main:
            torch.save({"parameters": parameters, "buffers": buffers}, folder / f"{case}.pt")
    return 0


launch.run(main)

"""train.py where rank 1 differs from rank 0 in what the argument names: code, data or model."""

import os
import runpy
import sys
from pathlib import Path

import torch

from kfac_dist.data.in_memory import InMemoryDataset
from kfac_dist.training import agreement, learner

what = sys.argv.pop(1)
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    if what == "code":
        agreement.code_fingerprint = lambda: "9.9"
    elif what == "data":
        InMemoryDataset.num_train = property(lambda self: 1000)
    else:
        create = learner.create_model

        def create_other(*arguments: object) -> torch.nn.Module:
            model = create(*arguments)
            model[0] = torch.nn.Conv2d(1, 16, 5, padding=2, bias=False)
            return model

        learner.create_model = create_other
sys.argv[0] = str(Path(__file__).resolve().parents[3] / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

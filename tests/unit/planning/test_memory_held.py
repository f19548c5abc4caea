"""The memory of a plan against what training steps allocate."""

import pytest
import torch
import torch.nn.functional as F

from kfac_dist.config.load import create_config
from kfac_dist.curvature import shifts
from kfac_dist.models import create_model
from kfac_dist.optim.kfac import KFAC
from kfac_dist.planning.simulate import Simulation
from kfac_dist.tensors import packing
from tests.unit.allocated_bytes import AllocatedBytes
from tests.unit.planning.machines import machine

TOLERANCE = 0.1  # the plan leaves out images, gradients of activations and what stages 5 and 6 take in passing


@pytest.mark.parametrize("interval", [1, 2, 12])  # Cholesky factors, both, inverses
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_plan_has_the_memory_of_a_step(ema_decay: float | None, interval: int) -> None:
    """Of a network whose matrices are larger than its activations, so that stage 4 takes the most."""
    shape = (1, 8, 8)
    config = create_config(
        {
            "run": {"name": "planned"},
            "data": {
                "name": "synthetic",
                "synthetic": {"shape": list(shape), "num_classes": 10, "num_train": 640, "num_eval": 8},
            },
            "model": {"name": "digits_cnn"},
            "batch": {"global_size": 2, "per_rank": 2},
            "train": {"epochs": 1},
            "optimizer": {"name": "kfac", "learning_rate": 0.1, "momentum": 0.9},
            "kfac": {
                "damping": {"initial": 0.1, "target": 0.1, "warmup_steps": 0, "batchnorm_ratio": 16},
                "refresh": {"schedule": "every", "interval": interval},
                "ema_decay": ema_decay,
            },
            "schedule": {"kind": "constant"},
        },
        "a test",
    )
    planned = Simulation(config, machine(device="cpu")).predict(1).memory_bytes
    for tables in (shifts._triangle_index, packing._triangle_index, packing._mirror_index):
        tables.cache_clear()  # which the plan counts
    allocated = AllocatedBytes()
    with allocated:
        model = create_model("digits_cnn", 10, shape, seed=0)
        optimizer = KFAC(model, lr=1e-3, ema_decay=ema_decay, refresh=interval)
        for _ in range(interval + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(2, *shape)), torch.zeros(2, dtype=torch.int64)).backward()
            optimizer.step()
    assert planned == pytest.approx(allocated.most, rel=TOLERANCE)

"""The memory that training steps allocate, against that of a plan."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.config.load import create_config
from kfac_dist.curvature import autocorrelation
from kfac_dist.curvature.refresh_schedule import IntervalRefresh
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
    for tables in (autocorrelation._triangle_index, packing._triangle_index, packing._mirror_index):
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


@pytest.mark.parametrize("intervals", [(1, 12), (12, 1)])
@pytest.mark.parametrize("channels", [32, 64])  # matrices that are factorised together, and one by one
def test_a_change_between_factors_and_inverses_takes_no_more_than_a_refresh(
    channels: int, intervals: tuple[int, int]
) -> None:
    """Defect: the old solvers stayed until the next step's gradients were preconditioned."""
    model = nn.Sequential(*[nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(6)])
    refresh = IntervalRefresh(lambda iteration: intervals[iteration >= 12])
    optimizer = KFAC(model, lr=1e-4, ema_decay=0.9, refresh=refresh)
    allocated, most = AllocatedBytes(), []
    with allocated:
        for _ in range(25):
            optimizer.zero_grad()
            model(torch.randn(1, channels, 2, 2)).square().mean().backward()
            allocated.most = 0
            optimizer.step()
            most.append(allocated.most)
    assert max(most) < 1.1 * most[11 if intervals == (1, 12) else 24]

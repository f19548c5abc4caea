"""The memory that a step takes for a while, by torch's own allocator."""

import pytest
import torch
from torch import nn

from kfac_dist import KFAC

pytestmark = pytest.mark.gpu

SIZE = 640  # too large to be factorised together


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("interval", [1, 12])  # Cholesky factors, inverses
def test_a_refresh_takes_little_more_than_another_copy_of_the_matrices(interval: int, ema_decay: float | None) -> None:
    """Besides it, what routines take for themselves: of one matrix at a time at most."""
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False, device="cuda") for _ in range(6)])
    images = torch.randn(32, SIZE, device="cuda")
    optimizer = KFAC(model, lr=1e-3, refresh=interval, ema_decay=ema_decay)
    peaks, helds = [], []
    for _ in range(2 * interval + 1):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - held)
        helds.append(torch.cuda.memory_allocated())
    matrix = 4 * SIZE**2
    assert peaks[interval] < (12 + 4) * matrix, "12 matrices, and routines"
    assert peaks[2 * interval] < (12 + 4) * matrix
    assert abs(helds[2 * interval] - helds[interval]) < matrix, "refreshes leave nothing"

"""Products in full fp32, also where the program allows less for its own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist import KFAC
from kfac_dist.tensors.full_precision import full_fp32_products

Precisions = tuple[str, str]


def precisions() -> Precisions:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def set_cuda_only() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_both() -> None:
    set_cuda_only()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


SETTINGS = [
    lambda: None,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    set_cuda_only,
    set_both,
]


@pytest.mark.parametrize("allow", SETTINGS)
def test_within_the_block_only(allow: Callable[[], None]) -> None:
    allow()
    before = precisions()
    with contextlib.suppress(ZeroDivisionError), full_fp32_products():
        assert set(precisions()) <= {"ieee", "none"}
        raise ZeroDivisionError
    assert precisions() == before


class Products(TorchDispatchMode):
    """What precision products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Precisions] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "cholesky_solve", "linalg_solve_triangular"):
            self.seen.add(precisions())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("interval", [1, 10])
@pytest.mark.parametrize("allow", SETTINGS[1:])
def test_kfacs_are_in_full_and_the_programs_as_it_allows(allow: Callable[[], None], interval: int) -> None:
    allow()
    before = precisions()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = KFAC(model, lr=0.1, refresh=interval)
    with Products() as of_program:
        loss = F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 3)
    with Products() as of_both:
        loss.backward()
    with Products() as of_step:
        optimizer.step()
    assert of_program.seen == {before}
    in_full = of_both.seen - {before}
    assert in_full == of_step.seen
    (seen,) = of_step.seen
    assert set(seen) <= {"ieee", "none"}
    assert precisions() == before

"""Products of fp32 matrices in fp32, whatever the program allows for its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_IN_FULL = ("ieee", "none")


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """Within the block no product of fp32 matrices is rounded to TF32 or bf16; then all is as it was.

    `torch.set_float32_matmul_precision("high")`, which frameworks advise for networks, allows it for the whole process.
    The small entries of a product with an ill-conditioned inverse would be noise.
    """
    undo = _compute_in_full()
    try:
        yield
    finally:
        undo()


def _compute_in_full() -> Callable[[], None]:
    """Allow no rounding from now on; returns what undoes that."""
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set `fp32_precision`, after which torch refuses to tell
        changed = [(backend, backend.fp32_precision) for backend in _BACKENDS if backend.fp32_precision not in _IN_FULL]
        _set_precisions([(backend, "ieee") for backend, _ in changed])
        return partial(_set_precisions, changed)
    if allowed == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, allowed)


def _set_precisions(precisions: list[tuple[object, str]]) -> None:
    for backend, precision in precisions:
        backend.fp32_precision = precision  # type: ignore[attr-defined]

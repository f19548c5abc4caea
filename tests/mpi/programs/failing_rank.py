"""train.py in which rank 1 fails in iteration 3, or before, in the way that the first argument names."""

import sys
import time
from typing import Any, NoReturn

from mpi4py import MPI

FAILING_ITERATION = 3

way = sys.argv.pop(1)
is_failing_rank = MPI.COMM_WORLD.Get_rank() == 1
if way == "missing folder" and is_failing_rank:
    sys.argv.append("data.root=/nonexistent/svhn")
if way == "missing package" and is_failing_rank:
    sys.modules["yaml"] = None  # type: ignore[assignment]  # makes its import fail
    print(f"failing at {time.time()}", flush=True)

import train  # noqa: E402

from kfac_dist.communicator import launch  # noqa: E402
from kfac_dist.errors import InputError  # noqa: E402
from kfac_dist.trainer import Trainer  # noqa: E402

train_iteration = Trainer._train_iteration


def failing_iteration(self: Trainer, iteration: int, *others: Any) -> None:
    if is_failing_rank and iteration == FAILING_ITERATION:
        fail()
    train_iteration(self, iteration, *others)


def fail() -> NoReturn:
    print(f"failing at {time.time()}", flush=True)
    if way == "exit 5":
        sys.exit(5)
    if way == "exit 0":
        sys.exit(0)
    if way == "input error":
        raise InputError("injected failure: image 7 cannot be read")
    raise RuntimeError("injected failure: disk on fire")


if way in ("exception", "exit 5", "exit 0", "input error"):
    Trainer._train_iteration = failing_iteration  # type: ignore[method-assign]
launch.run(train.main)

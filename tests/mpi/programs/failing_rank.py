"""train.py, but rank 1 fails in iteration 3 in the way that the first argument names, or before that."""

import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import train
from mpi4py import MPI

from kfac_dist.communicator import launch
from kfac_dist.data import Dataset, SlotSampler
from kfac_dist.errors import InputError

FAILING_ITERATION = 3

original_batches = Dataset.train_batches


def fail(way: str) -> NoReturn:
    print(f"failing at {time.time()}", flush=True)
    if way == "exit 5":
        sys.exit(5)
    if way == "exit 0":
        sys.exit(0)
    if way == "input error":
        raise InputError("injected failure: image 7 cannot be read")
    raise RuntimeError("injected failure: disk on fire")


def failing_batches(
    self: Dataset, sampler: SlotSampler, rank: int, num_ranks: int, *iterations: int
) -> Iterator[tuple[Any, Any]]:
    num_slots = len(sampler.local_slots(rank, num_ranks))
    for number, batch in enumerate(original_batches(self, sampler, rank, num_ranks, *iterations)):
        if rank == 1 and number == FAILING_ITERATION * num_slots:
            fail(way)
        yield batch


way = sys.argv.pop(1)
if way == "missing folder":
    if MPI.COMM_WORLD.Get_rank() == 1:
        sys.argv.append("data.root=/nonexistent/svhn")
else:
    Dataset.train_batches = failing_batches  # type: ignore[method-assign]
launch.run(train.main)

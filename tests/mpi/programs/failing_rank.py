"""train.py in which rank 1 fails in iteration 3, or before, in the way that the first argument names."""

import os
import resource
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

from mpi4py import MPI

FAILING_ITERATION = 3

way = sys.argv.pop(1)
is_failing_rank = MPI.COMM_WORLD.Get_rank() == 1
if way == "missing folder" and is_failing_rank:
    sys.argv.append("data.root=/nonexistent/svhn")
if way == "other configuration" and is_failing_rank:
    sys.argv.append("train.epochs=7")


class MissingPackage(MetaPathFinder):
    """Makes the import of PyYAML fail, as on a node where it is not installed."""

    def find_spec(self, name: str, *others: Any) -> None:
        if name == "yaml":
            print(f"failing at {time.time()}", flush=True)
            raise ModuleNotFoundError("No module named 'yaml'", name=name)


if way == "missing package" and is_failing_rank:
    sys.meta_path.insert(0, MissingPackage())

import train  # noqa: E402

if way == "missing package":  # what imports first, imports it
    train.run_script()

from kfac_dist.errors import InputError  # noqa: E402
from kfac_dist.training.trainer import Trainer  # noqa: E402

train_iteration = Trainer._train_iteration


def failing_iteration(self: Trainer, iteration: int, *others: Any) -> Any:
    if is_failing_rank and iteration == FAILING_ITERATION:
        fail()
    return train_iteration(self, iteration, *others)


def fail() -> NoReturn:
    print(f"failing at {time.time()}", flush=True)
    if way == "Ctrl-C":
        for _ in range(2):  # the first asks for an orderly stop
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        time.sleep(30)
    if way == "exit 5":
        sys.exit(5)
    if way == "exit 0":
        sys.exit(0)
    if way == "input error":
        raise InputError("injected failure: image 7 cannot be read")
    raise RuntimeError("injected failure: disk on fire")


def full_disk(self: Trainer, iteration: int, *others: Any) -> Any:
    if iteration == FAILING_ITERATION and not is_failing_rank:  # rank 0 writes
        print(f"failing at {time.time()}", flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # no file can grow
    return train_iteration(self, iteration, *others)


if way == "full disk":
    Trainer._train_iteration = full_disk  # type: ignore[assignment]
if way in ("exception", "exit 5", "exit 0", "input error", "Ctrl-C"):
    Trainer._train_iteration = failing_iteration  # type: ignore[assignment]
train.run_script()

"""train.py with a fault that the variable FAULT names: `WHAT:RANK:WHERE[:NUMBER]`.

WHAT is kill (SIGKILL to itself) or a signal's name; WHERE a function of a module, such as
kfac_dist.checkpoints.save.write_shard, at the beginning of whose NUMBER-th call (default 1) it happens.
"""

import importlib
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def install(fault: str) -> None:
    what, rank, where, *number = fault.split(":")
    if int(os.environ["OMPI_COMM_WORLD_RANK"]) != int(rank):
        return
    owner_name, _, name = where.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ImportError:
        module, _, class_name = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    inner = getattr(owner, name)
    calls = 0

    def faulty(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(*number or ["1"]):
            print(f"fault: {fault}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.Signals[what])
        return inner(*arguments, **settings)

    setattr(owner, name, faulty)


if os.environ["FAULT"]:
    install(os.environ["FAULT"])
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

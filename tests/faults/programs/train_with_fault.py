"""train.py with faults that the variable FAULT names: `WHAT:RANK:WHERE[:NUMBER]`, several with `;` between them.

WHERE is a function of a module, such as kfac_dist.checkpoints.save.write_shard, and NUMBER says before which of its
calls it happens (1 if left out; `5+` for the fifth and all after it). WHAT is

    kill, or a signal's name      sent to itself
    kill+SECONDS                  the same, so much later
    raise, full                   a RuntimeError; an OSError as of a full disk
    nan                           the batch that the function returns has NaN for images
    negative                      the factor that it returns is negated: indefinite
    skip                          it is not called; its first argument is returned
    slow, sleep                   it takes 0.3 s, 1,000 s longer
"""

import errno
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def install(fault: str) -> None:
    what, rank, where, *numbers = fault.split(":")
    if int(os.environ["OMPI_COMM_WORLD_RANK"]) != int(rank):
        return
    number = numbers[0] if numbers else "1"
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
        first = int(number.rstrip("+"))
        if calls != first and not (number.endswith("+") and calls > first):
            return inner(*arguments, **settings)
        print(f"fault: {fault}", flush=True)
        match what:
            case "raise":
                raise RuntimeError("a fault")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "skip":
                return arguments[1]
            case "sleep":
                time.sleep(1000)
            case "slow":
                time.sleep(0.3)
            case "nan":
                batch = inner(*arguments, **settings)
                return replace(batch, images=batch.images * float("nan"))
            case "negative":
                return -inner(*arguments, **settings)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case _ if what.startswith("kill+"):
                threading.Timer(float(what[5:]), os.kill, (os.getpid(), signal.SIGKILL)).start()
            case _:
                os.kill(os.getpid(), signal.Signals[what])
        return inner(*arguments, **settings)

    setattr(owner, name, faulty)


for each in filter(None, os.environ["FAULT"].split(";")):
    install(each)
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

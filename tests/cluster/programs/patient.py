"""Runs a program as Python does, but an iteration of training does not begin before this rank got a signal.

    WAIT_AT=8 python patient.py train.py CONFIG.yaml …

Without WAIT_AT, and in a job's second start, nothing is waited for.
"""

import os
import runpy
import sys
import time
from typing import Any


def install(wait_at: int) -> None:
    from kfac_dist.training.trainer import Trainer

    inner = Trainer._train_iteration

    def patient(self: Trainer, iteration: int, *arguments: Any) -> Any:
        if iteration == wait_at:
            print(f"waiting at iteration {iteration}", flush=True)
            while not self._stops.received:
                time.sleep(0.05)
        return inner(self, iteration, *arguments)

    Trainer._train_iteration = patient  # type: ignore[method-assign]


sys.argv = sys.argv[1:]
if "WAIT_AT" in os.environ and "SLURM_RESTART_COUNT" not in os.environ and sys.argv[0].endswith("train.py"):
    install(int(os.environ["WAIT_AT"]))
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")

"""How the failure of one rank ends the whole job: the others may be blocked in a collective with it."""

import contextlib
import os
import sys
from types import ModuleType, TracebackType
from typing import NoReturn

import torch.distributed as dist

from kfac_dist.communicator.launcher_variables import launched_by_mpi, promised_size

EXIT_FAILED = 3

_installed_in: int | None = None  # the process; a child that was forked from it is no rank


def abort_on_exception() -> None:
    """From now on an uncaught exception ends the job with exit code 3, its traceback printed first.

    What `sys.excepthook` was does the printing. An exception in a thread other than the main one ends that thread only,
    as ever in Python, and `sys.exit` is no exception.
    """
    global _installed_in
    if _installed_in == os.getpid():
        return
    _installed_in = os.getpid()
    previous = sys.excepthook

    def report_and_abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            previous(kind, error, trace)
        finally:  # a user's own may fail, too
            if _installed_in == os.getpid() and _has_other_ranks():
                abort(EXIT_FAILED)

    sys.excepthook = report_and_abort


def abort(code: int) -> NoReturn:
    """End all ranks now: no handler at exit runs, for some of them wait for the other ranks.

    MPI ends its job itself. Else this process ends, and torchrun (or another launcher) ends the others.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, full, or without a reader: the other ranks wait all the same
            stream.flush()
    with contextlib.suppress(Exception):
        _write_held_back()
    mpi = _mpi_of_the_job()
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def _write_held_back() -> None:
    """What torch's own hook, where it was put around ours, holds back until ours returns."""
    held_back = getattr(sys.stderr, "getvalue", None)
    if held_back is not None and sys.__stderr__ is not None:
        sys.__stderr__.write(held_back())
        sys.__stderr__.flush()


def _has_other_ranks() -> bool:
    promise = promised_size(os.environ)
    if promise is not None and promise[1] > 1:
        return True
    mpi = running_mpi()
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        return True
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _mpi_of_the_job() -> ModuleType | None:
    """MPI, started now where mpirun started this rank but the rank failed before: the others wait for it to start."""
    if "mpi4py.MPI" not in sys.modules and launched_by_mpi(os.environ):
        with contextlib.suppress(ImportError, RuntimeError):
            import mpi4py.MPI  # noqa: F401  # starts MPI
    return running_mpi()


def running_mpi() -> ModuleType | None:
    """`mpi4py.MPI`, where it has been imported, and so started, and not been finalised."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None

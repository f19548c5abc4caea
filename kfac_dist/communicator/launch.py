"""Starting and ending a job: what the launcher promised, each rank's threads, and how a failure ends all ranks.

Importing this module makes an uncaught exception abort the whole job, so import it first: a rank that lacks a package
would otherwise wait for the others in MPI_Finalize, and they for it in their first collective.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NoReturn

import torch
from mpi4py import MPI

from kfac_dist.errors import InputError, RankFailed

ALLOW_SIZE_VARIABLE = "KFAC_DIST_ALLOW_SIZE_MISMATCH"

# MPI's own variables come first: inside sbatch, mpirun's daemons run under srun and SLURM_* describe those.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")

EXIT_BAD_INPUT = 2
EXIT_FAILED = 3
EXIT_STOPPED = 75  # after a checkpoint: to be started again with --resume
EXIT_STOPPED = 75  # after a checkpoint: to be started again with --resume
EXIT_INTERRUPTED = 130  # as shells have it: 128 and SIGINT's number


def promised_size(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The world size that the launcher's environment promises.

    Returns:
        The deciding variable and its value, or None when no launcher left one.
    """
    for variable in _SIZE_VARIABLES:
        value = environment.get(variable, "")
        if value.isdigit():
            return variable, int(value)
    return None


def check_world_size(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a job that silently became several single-rank jobs.

    Args:
        size: Ranks that MPI really has.
        environment: Usually `os.environ`.

    Raises:
        InputError: If the launcher promised another number and the opt-out variable is not set.
    """
    promise = promised_size(environment)
    if promise is None or promise[1] == size or environment.get(ALLOW_SIZE_VARIABLE) == "1":
        return
    variable, expected = promise
    raise InputError(
        f"the launcher promised {expected} ranks ({variable}={expected}) but MPI sees {size}: "
        f"every process would train alone. The mpirun and the MPI library that mpi4py loads must be the same "
        f"installation ({MPI.Get_library_version().splitlines()[0]}); under Slurm prefer mpirun to srun, or "
        f"srun --mpi=pmix. If {size} is what you want, set {ALLOW_SIZE_VARIABLE}=1."
    )


def set_threads_per_rank(local_size: int) -> int:
    """Give this rank its share of the cores it may run on, unless OMP_NUM_THREADS says otherwise.

    Returns:
        Threads that torch will use for one operation.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_size))
    return torch.get_num_threads()


def run(main: Callable[[], int]) -> NoReturn:
    """Run a rank's main function and end the process so that no other rank is left waiting.

    `main` returns an exit code that all ranks agree on. An exception, or `sys.exit` from inside, is one rank's
    own: its traceback is printed and the whole job is aborted, for the others may be blocked in a collective. So it
    is with an `InputError`, a `RankFailed` and Ctrl-C, but for the traceback.
    """
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        _abort(EXIT_BAD_INPUT)
    except RankFailed as error:
        print(f"training failed: {error}", file=sys.stderr)
        _abort(EXIT_FAILED)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as leaving:
        traceback.print_exc()
        _abort(leaving.code if isinstance(leaving.code, int) and leaving.code else 1)
    except BaseException:
        traceback.print_exc()
        _abort(EXIT_FAILED)
    sys.exit(code)


def _abort(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if MPI.COMM_WORLD.Get_size() > 1:
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def _end_interrupted() -> NoReturn:
    print("interrupted (Ctrl-C): what was written so far is kept", file=sys.stderr)
    _abort(EXIT_INTERRUPTED)


def _abort_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # before `run`, as while modules are imported
        _end_interrupted()
    sys.__excepthook__(kind, error, trace)
    if MPI.COMM_WORLD.Get_size() > 1:
        _abort(EXIT_FAILED)


sys.excepthook = _abort_on_exception

"""Starting and ending a program of this package: each rank's threads, exit codes, and how a failure ends all ranks.

Importing this module makes an uncaught exception abort the whole job, so import it first: a rank that lacks a package
would otherwise leave the others waiting. In a script of one's own `create_communicator` does the same.
"""

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import torch

from kfac_dist.communicator.abort import EXIT_FAILED, abort, abort_on_exception
from kfac_dist.communicator.launcher_variables import ALLOW_SIZE_VARIABLE, check_world_size, promised_size, unused_tasks
from kfac_dist.communicator.terminal import outliving_readers
from kfac_dist.errors import InputError, RankFailed

__all__ = [
    "ALLOW_SIZE_VARIABLE",
    "EXIT_BAD_INPUT",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_NO_PROGRESS",
    "EXIT_STOPPED",
    "check_world_size",
    "promised_size",
    "run",
    "set_threads_per_rank",
    "unused_tasks",
]

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # after a checkpoint: to be started again with --resume
EXIT_NO_PROGRESS = 93  # restarted in vain: not to be started again
EXIT_INTERRUPTED = 130  # as shells have it: 128 and SIGINT's number


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
    is with an `InputError`, a `RankFailed` and Ctrl-C, but for the traceback. A terminal that is gone ends nothing.
    """
    with outliving_readers():
        _run(main)


def _run(main: Callable[[], int]) -> NoReturn:
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        abort(EXIT_BAD_INPUT)
    except RankFailed as error:
        print(f"training failed: {error}", file=sys.stderr)
        abort(EXIT_FAILED)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as leaving:
        traceback.print_exc()
        abort(leaving.code if isinstance(leaving.code, int) and leaving.code else 1)
    except BaseException:
        traceback.print_exc()
        abort(EXIT_FAILED)
    sys.exit(code)


def _end_interrupted() -> NoReturn:
    print("interrupted (Ctrl-C): what was written so far is kept", file=sys.stderr)
    abort(EXIT_INTERRUPTED)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # before `run`, as while modules are imported
        _end_interrupted()
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
abort_on_exception()

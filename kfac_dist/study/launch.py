"""Starting workers on this machine, watching over them, and showing how far the study is."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import SpawnProcess
from types import FrameType

from tqdm import tqdm

from kfac_dist.errors import InputError
from kfac_dist.runs.progress import PROGRESS_VARIABLE
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.worker import WorkerSettings, work

EXIT_STOPPED = 75
EXIT_WORKER_FAILED = 1
_POLL_SECONDS = 0.5


class StudyProgress:
    """Finished trials on stderr, with the expected end: a bar in a terminal, else a line now and then.

    The environment variable KFAC_DIST_PROGRESS decides where it is set: ``bar``, ``lines`` or ``off``.
    """

    _LINES = 20

    def __init__(self, total: int, done: int) -> None:
        style = os.environ.get(PROGRESS_VARIABLE) or ("bar" if sys.stderr.isatty() else "lines")
        if style not in ("bar", "lines", "off"):
            raise InputError(f"{PROGRESS_VARIABLE} must be bar, lines or off, got {style!r}")
        self._style, self._total, self._first, self._done = style, total, done, done
        self._started = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit="trial", smoothing=0.05, disable=style != "bar")

    def show(self, done: int) -> None:
        """So many of the trials are finished."""
        self._bar.update(done - self._done)
        if self._style == "lines" and done * self._LINES // self._total > self._done * self._LINES // self._total:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, done - self._first) * (self._total - done)  # a retry takes trials back
            end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
            print(
                f"{done} of {self._total} trials, {elapsed:.0f} s, about {left:.0f} s left (until {end})",
                file=sys.stderr,
                flush=True,
            )
        self._done = done

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def run_workers(settings: WorkerSettings, num_workers: int) -> int:
    """Run the selected trials on this machine; the exit code: 0, 75 where a signal stopped them, 1 if a worker failed.

    A trial that failed is no failure of its worker, but a full disk, or a damaged file of the study, is. A worker that
    a signal killed is replaced, as long as there is something to do.

    Args:
        settings: Of all workers.
        num_workers: > 0.
    """
    folder = StudyFolder(settings.folder)
    selected = set(settings.selected)
    if selected <= folder.finished():
        return 0
    progress = StudyProgress(len(selected), len(selected & folder.finished()))
    # Read when a child loads its libraries, before it can set its threads itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    context = multiprocessing.get_context("spawn")

    def start(number: int) -> SpawnProcess:
        process = context.Process(target=work, args=(settings, number), name=f"worker-{number}")
        process.start()
        return process

    with _Signals() as signals:
        workers = [start(number) for number in range(num_workers)]
        try:
            while any(worker.is_alive() for worker in workers):
                time.sleep(_POLL_SECONDS)
                progress.show(len(selected & folder.finished()))
                if signals.received:
                    _stop(workers)
                    return EXIT_STOPPED
                _replace_dead_(workers, start)
        finally:
            progress.show(len(selected & folder.finished()))
            progress.close()
    codes = {worker.exitcode for worker in workers}
    if EXIT_STOPPED in codes:
        return EXIT_STOPPED
    if codes == {0} or selected <= folder.finished():
        return 0
    print(f"error: a worker ended before its trials were done; see {folder.workers}", file=sys.stderr)
    return EXIT_WORKER_FAILED


def threads_for(num_workers: int) -> int:
    """Each worker's share of the cores that this process may run on, unless OMP_NUM_THREADS says otherwise."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // num_workers)


def _replace_dead_(workers: list[SpawnProcess], start: Callable[[int], SpawnProcess]) -> None:
    """Replace workers that a signal killed; one that left by itself, even by an exception, would do so again."""
    for number, worker in enumerate(workers):
        if worker.exitcode is not None and worker.exitcode < 0:
            workers[number] = start(number)


def _stop(workers: Sequence[SpawnProcess]) -> None:
    """Let the workers save what they train, and end."""
    while alive := [worker for worker in workers if worker.is_alive()]:
        for worker in alive:  # again: one that is told in the last iteration of a trial would take the next
            worker.terminate()
        alive[0].join(_POLL_SECONDS)


class _Signals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 are remembered."""

    def __enter__(self) -> "_Signals":
        self.received = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.received = True

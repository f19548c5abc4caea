"""What all tests share: programs under mpirun, and what is skipped on which machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA_VARIABLE = "KFAC_DIST_DATA"

Completed = subprocess.CompletedProcess[str]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="for the record: run it with -m long"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here (torch.cuda.is_available() is false)"))


def run_limited(command: Sequence[str | os.PathLike[str]], env: Mapping[str, str], timeout: float) -> Completed:
    """Run a command from the checkout's root; after `timeout` seconds end it and all it started, and fail."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_group(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if timed_out:
        command_text = " ".join(map(str, command))
        pytest.fail(f"still running after {timeout} s: {command_text}\n{texts[0][-4000:]}\n{texts[1][-4000:]}")
    return Completed(command, process.returncode, texts[0], texts[1])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    # mpirun gives each rank a process group of its own: told to terminate, it kills the ranks.
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
            process.wait(5)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@pytest.fixture(scope="session")
def mpirun() -> Callable[..., Completed]:
    """``mpirun(n, args, env=None, timeout=60)`` runs ``python *args`` on n ranks, one thread a rank.

    More ranks than cores are fine. The working directory is the checkout's root. Returns exit code, stdout
    and stderr, and checks none of them.
    """

    def run(
        num_ranks: int, args: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Completed:
        command = [ROOT / "scripts/mpirun.sh", "-n", str(num_ranks), sys.executable, *args]
        return run_limited(command, env or {}, timeout)

    return run


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Completed]:
    """``run_python(args, env=None, timeout=60)``: like `mpirun`, but ``python *args`` on its own."""

    def run(args: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 60) -> Completed:
        return run_limited([sys.executable, *args], env or {}, timeout)

    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, which the variable KFAC_DIST_DATA names; skips where it is not set."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"needs real data: {DATA_VARIABLE} does not name a folder that holds it")
    return Path(folder)

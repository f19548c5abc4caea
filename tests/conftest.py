"""What all tests share: programs under mpirun, and what is skipped on which machine."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA_VARIABLE = "KFAC_DIST_DATA"

Completed = subprocess.CompletedProcess[str]
Interpreter = Callable[[Sequence[str | os.PathLike[str]], dict[str, str]], list[str | os.PathLike[str]]]

CHECKOUT_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
"""For programs in other folders: a program's own folder leads its sys.path, not the checkout."""

BASE = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""What all programs find in their environment."""
READ_AT_START = ("CUDA", "LD_", "MKL", "OMP_NUM", "PYTHON", "TORCH")
"""Variables that an interpreter or torch reads only when it starts."""


def pytest_configure() -> None:
    """Programs see Ctrl-C as from a terminal, also where the tests were started by a shell's `&`, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="for the record: run it with -m long"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available() and "KFAC_DIST_EMULATED_GPUS" in os.environ:
        pytest.exit("torch sees no GPU, although one is emulated", returncode=pytest.ExitCode.INTERNAL_ERROR)
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here (torch.cuda.is_available() is false)"))


def run_limited(command: Sequence[str | os.PathLike[str]], env: Mapping[str, str], timeout: float) -> Completed:
    """Run a command from the checkout's root; after `timeout` seconds end it and all it started, and fail."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | BASE | env,
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
def python() -> Iterator[Interpreter]:
    """``python(args, env)``: the command that runs ``python *args`` in this environment, fast where it can be."""
    server: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"

        def command(args: Sequence[str | os.PathLike[str]], env: dict[str, str]) -> list[str | os.PathLike[str]]:
            nonlocal server
            changed = {name for name, value in env.items() if (os.environ | BASE).get(name) != value}
            first = os.fspath(args[0])
            is_program = first.endswith(".py") or first == "-m"
            if env.get("PYTHONPATH") == CHECKOUT_PATH:  # other folders may hold packages in place of installed ones
                changed -= {"PYTHONPATH"}
            if not is_program or any(name.startswith(READ_AT_START) for name in changed):
                return [sys.executable, *args]
            if server is None:
                # What is forked from a process that has asked CUDA itself for GPUs cannot use any.
                environment = os.environ | BASE | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
                program = [sys.executable, ROOT / "tests/warm_start/server.py", path]
                server = subprocess.Popen(program, env=environment, stdin=subprocess.PIPE)
                while not path.exists():
                    assert server.poll() is None, "tests/warm_start/server.py has ended"
                    time.sleep(0.02)
            env["KFAC_DIST_TEST_SERVER"] = str(path)
            return [sys.executable, "-I", "-S", ROOT / "tests/warm_start/client.py", *args]

        yield command
        if server is not None:
            server.communicate()  # which closes its standard input
            assert server.returncode == 0


@pytest.fixture(scope="session")
def mpirun(python: Interpreter) -> Callable[..., Completed]:
    """``mpirun(n, args, env=None, timeout=60)`` runs ``python *args`` on n ranks, one thread a rank.

    More ranks than cores are fine. The working directory is the checkout's root. Returns exit code, stdout
    and stderr, and checks none of them.
    """

    def run(
        num_ranks: int, args: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Completed:
        own = dict(env or {})
        command = [ROOT / "scripts/mpirun.sh", "-n", str(num_ranks), *python(args, own)]
        return run_limited(command, own, timeout)

    return run


@pytest.fixture(scope="session")
def run_python(python: Interpreter) -> Callable[..., Completed]:
    """``run_python(args, env=None, timeout=60)``: like `mpirun`, but ``python *args`` on its own."""

    def run(args: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 60) -> Completed:
        own = dict(env or {})
        return run_limited(python(args, own), own, timeout)

    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, which the variable KFAC_DIST_DATA names; skips where it is not set."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"needs real data: {DATA_VARIABLE} does not name a folder that holds it")
    return Path(folder)

"""Ctrl-C and a reader that is gone: no traceback, however early they come."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from kfac_dist.commands.endings import interruptible
from kfac_dist.commands.table import COMMANDS, Command, main
from tests.paths import QUICKSTART, ROOT

Run = Callable[..., CompletedProcess[str]]

# In place of a module that is imported: the signal comes in the middle of it, and it catches the exception.
INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    raise ImportError("as if it were not installed") from None
"""
KFAC_DIST = ["-c", "import sys; from kfac_dist.commands.table import main; sys.exit(main())"]


@pytest.fixture
def interrupted_in(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """``interrupted_in(module)``: the environment in which importing it is interrupted."""

    def environment(module: str) -> dict[str, str]:
        (tmp_path / f"{module}.py").write_text(INTERRUPTED, encoding="utf-8")
        return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}

    return environment


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["train.py", QUICKSTART], "argparse"),
        (["train.py", QUICKSTART], "pydantic"),
        (["train.py", QUICKSTART], "torch"),
        ([*KFAC_DIST, "explain", QUICKSTART], "torch"),
        ([*KFAC_DIST, "doctor"], "torch"),
        ([*KFAC_DIST, "memory", "resnet50"], "torch"),
    ],
    ids=["train.py, early", "train.py, earlier than torch", "train.py", "explain", "doctor", "memory"],
)
def test_while_modules_are_imported(
    words: list[str], module: str, run_python: Run, interrupted_in: Callable[[str], dict[str, str]]
) -> None:
    ended = run_python(words, env=interrupted_in(module))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.mpi
def test_of_a_rank(mpirun: Run, interrupted_in: Callable[[str], dict[str, str]]) -> None:
    ended = mpirun(2, ["train.py", QUICKSTART], env=interrupted_in("torch"))
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr


def test_while_a_command_of_one_process_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "raised", Command("signal:raise_signal", ""))
    monkeypatch.setattr("signal.raise_signal", lambda words: signal.default_int_handler(signal.SIGINT, None))
    assert main(["raised"]) == 130
    assert capsys.readouterr() == ("", "interrupted (Ctrl-C)\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """As a shell's `&` and nohup have it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_afterwards_it_is_an_exception_again() -> None:
    with interruptible():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def without_reader() -> Callable[..., CompletedProcess[str]]:
    """``without_reader(*words)`` runs a program whose output nobody reads; nor its messages, if so wanted."""

    def run(*words: str | Path, unbuffered: str = "1", messages: bool = True) -> CompletedProcess[str]:
        reader, writer = os.pipe()
        os.close(reader)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words]
        with os.fdopen(writer, "wb") as output:
            error = subprocess.PIPE if messages else output
            return subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=error, text=True, timeout=60
            )

    return run


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["train.py", "--help"], "1"),
        (["train.py", QUICKSTART, "--print-config"], ""),
        (["train.py", QUICKSTART, "--explain"], "1"),
        ([*KFAC_DIST, "--version"], ""),
        ([*KFAC_DIST, "plan", "--help"], "1"),
        ([*KFAC_DIST, "plan", QUICKSTART, "--ranks", "1", "--json"], "1"),
        ([*KFAC_DIST, "memory", "--help"], ""),
        ([*KFAC_DIST, "memory", "digits_cnn", "--image-size", "8", "--ranks", "1"], "1"),
        ([*KFAC_DIST, "doctor"], "1"),
    ],
)
def test_output_that_nobody_reads(
    words: list[str], unbuffered: str, without_reader: Callable[..., CompletedProcess[str]]
) -> None:
    ended = without_reader(*words, unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("program", [["train.py"], [*KFAC_DIST, "train"]], ids=["train.py", "kfac-dist"])
@pytest.mark.parametrize("messages", [True, False])
def test_a_run_that_nobody_watches_any_more_goes_on(
    messages: bool, program: list[str], tmp_path: Path, without_reader: Callable[..., CompletedProcess[str]]
) -> None:
    words = [QUICKSTART, f"run.output_dir={tmp_path}", "train.epochs=1", "schedule.end_epoch=1"]
    ended = without_reader(*program, *words, messages=messages)
    assert ended.returncode == 0
    assert "Traceback" not in (ended.stderr or "")
    assert (tmp_path / "quickstart/DONE").exists()
    log = (tmp_path / "quickstart/log.txt").read_text(encoding="utf-8")
    assert "test accuracy" in log
    assert "Traceback" not in log

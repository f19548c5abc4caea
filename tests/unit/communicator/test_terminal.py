"""Programs outlive whoever reads their output."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from kfac_dist.communicator import terminal
from kfac_dist.communicator.terminal import outliving_readers

StreamOf = Callable[[str, TextIO], None]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> StreamOf:
    """``streams(name, stream)``: from now on this is standard output or error."""
    return lambda name, stream: monkeypatch.setattr(sys, name, stream)


def unread_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1, encoding="utf-8")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_nobody_reads_goes_nowhere(name: str, streams: StreamOf) -> None:
    with unread_pipe() as pipe:
        streams(name, pipe)
        with outliving_readers():
            for _ in range(3):
                print("text", file=getattr(sys, name), flush=True)
        assert getattr(sys, name) is pipe
        pipe.write("what is printed afterwards, too\n")


def test_what_was_still_held_back_is_no_error_at_the_end(streams: StreamOf) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:  # flushed by its end only
        streams("stdout", pipe)
        with outliving_readers():
            print("text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_an_error_for_results_but_not_for_messages(streams: StreamOf) -> None:
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as messages:
        streams("stderr", messages)
        with outliving_readers():
            print("a message", file=sys.stderr, flush=True)
    results = open("/dev/full", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    streams("stdout", results)
    with pytest.raises(OSError, match="No space left"), outliving_readers():
        print("a result")
    assert sys.stdout is results
    os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())
    results.close()


def test_a_slow_reader_misses_text_and_gets_what_comes_later(streams: StreamOf) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "w", buffering=1, encoding="utf-8") as pipe:
        streams("stderr", pipe)
        with outliving_readers():
            for _ in range(3000):
                sys.stderr.write("0123456789" * 10 + "\n")
            assert len(os.read(reader, 1 << 20)) < 3000 * 101
            sys.stderr.write("later\n")
            assert os.read(reader, 1 << 20).endswith(b"later\n")
    os.close(reader)


def test_threads_that_miss_text_at_once_leave_the_reader_there(
    streams: StreamOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: the second took nowhere, to which the first had led the stream, for the reader: later text was lost."""
    lead_nowhere = terminal._Outliving._lead_nowhere

    def slowly(stream: terminal._Outliving) -> None:
        lead_nowhere(stream)
        time.sleep(0.2)

    monkeypatch.setattr(terminal._Outliving, "_lead_nowhere", slowly)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1, encoding="utf-8") as pipe, os.fdopen(reader) as shown:
        streams("stderr", pipe)
        with outliving_readers():
            threads = [threading.Thread(target=sys.stderr._lose, args=(BlockingIOError(),)) for _ in range(2)]
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            for thread in threads:
                thread.join()
            sys.stderr.write("later\n")
        os.set_blocking(reader, False)
        assert shown.readline() == "later\n"


def test_what_a_terminal_cannot_show_is_written_out(streams: StreamOf) -> None:
    shown = io.BytesIO()
    with io.TextIOWrapper(shown, encoding="latin-1") as terminal:
        streams("stdout", terminal)
        with outliving_readers():
            print("ü …")
        assert shown.getvalue() == b"\xfc \\u2026\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("no-such-command", 2)])
def test_a_stream_that_was_closed_at_the_start_is_no_error(words: str, code: int, closed: str) -> None:
    command = f'"{sys.executable}" -m kfac_dist {words} {closed}'
    finished = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == code
    assert "Traceback" not in finished.stderr


def test_an_error_of_another_pipe_stays_one() -> None:
    with pytest.raises(BrokenPipeError), outliving_readers():
        raise BrokenPipeError

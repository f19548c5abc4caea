"""log.txt has what the terminal shows, with time, rank and level, and the warnings of all ranks."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from kfac_dist.runs.lock import RunLock
from kfac_dist.runs.log import RunLog
from tests.paths import QUICKSTART, ROOT

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 rank (\d+) (INFO|WARNING|ERROR) (.*)")


def lines(folder: Path) -> list[tuple[int, str, str]]:
    matches = [LINE.fullmatch(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    assert all(matches)
    return [(int(match[1]), match[2], match[3]) for match in matches if match]


def test_what_the_terminal_shows(run_python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    overrides = [f"run.output_dir={tmp_path}", "train.epochs=1", "batch={global_size: 1536, per_rank: 64}"]
    finished = run_python([ROOT / "train.py", QUICKSTART, *overrides], env={"KFAC_DIST_PROGRESS": "lines"})
    assert finished.returncode == 0, finished.stderr
    found = lines(tmp_path / "quickstart")
    shown = [line for line in (finished.stderr + finished.stdout).splitlines() if line]
    assert {text for _, _, text in found} == set(shown)
    assert {rank for rank, _, _ in found} == {0}
    assert [level for _, level, text in found if text.startswith("warning: ")] == ["WARNING"]


def test_a_crash_is_in_it(run_python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    code = (
        "import sys, train; from kfac_dist.training.trainer import Trainer\n"
        "def fail(*arguments): raise RuntimeError('a fault')\n"
        f"Trainer._evaluate = fail; sys.argv = ['train.py', {str(QUICKSTART)!r}, 'run.output_dir={tmp_path}']\n"
        "train.run_script()"
    )
    failed = run_python(["-c", code], env={"PYTHONPATH": str(ROOT), "KFAC_DIST_PROGRESS": "off"})
    assert failed.returncode == 3
    text = (tmp_path / "quickstart" / "log.txt").read_text()
    assert "rank 0 ERROR Traceback" in text
    assert "RuntimeError: a fault" in text


def test_ranks_share_it(tmp_path: Path) -> None:
    logs = [RunLog(rank) for rank in (0, 1)]
    for rank, log in enumerate(logs):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            record = logging.LogRecord("x", level, "", 0, "%s of rank %d", (logging.getLevelName(level), rank), None)
            if level >= log.level:
                log.handle(record)
    assert not list(tmp_path.iterdir()), "held until the folder is known"
    for log in logs:
        log.open(tmp_path)
    logs[1].write("ERROR", "later")
    for log in logs:
        log.close()
    assert lines(tmp_path) == [
        (0, "INFO", "INFO of rank 0"),
        (0, "WARNING", "WARNING of rank 0"),
        (1, "WARNING", "WARNING of rank 1"),
        (1, "ERROR", "later"),
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_is_not_there_stops_nothing(rank: int, tmp_path: Path) -> None:
    log = RunLog(rank)
    log.open(tmp_path / "nowhere")
    log.write("ERROR", "a text")
    log.write_with_stacks("ERROR", "a text")
    log.close()


def test_text_and_stacks_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: the stacks of ranks that hung together stood in each other's lines."""
    log = RunLog(0)
    log.open(tmp_path)
    written: list[bytes] = []
    monkeypatch.setattr("os.write", lambda file, data: written.append(data))
    log.write_with_stacks("ERROR", "a text")
    (record,) = written
    assert b" rank 0 ERROR a text\n" in record
    assert b"in test_text_and_stacks_are_one_write\n" in record


def test_a_finished_run_ends_with_0_where_its_output_cannot_be_written(tmp_path: Path) -> None:
    words = [ROOT / "train.py", QUICKSTART, f"run.output_dir={tmp_path}", "train.epochs=1", "data.train_limit=128"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "quickstart" / "DONE").exists()
    assert lines(tmp_path / "quickstart")[-1][2].startswith("test accuracy ")


def test_its_rights_are_those_that_the_user_wants(tmp_path: Path) -> None:
    """With umask 002, colleagues of a group go on with each other's runs."""
    before = os.umask(0o002)
    try:
        with RunLog(0) as log:
            log.open(tmp_path)
            log.write("INFO", "here")
        RunLock(tmp_path).release()
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "log.txt": "0o664",
        ".lock": "0o664",
    }


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """As one that was named under another encoding; the run goes on there and is evaluated."""
    folder = tmp_path / os.fsdecode(b"b\xe4d")
    folder.mkdir()
    settings = [QUICKSTART, "train.epochs=1", "data={name: digits, train_limit: 128, eval_limit: 32}"]
    for words in (settings, [*settings, "--resume", folder / "runs/quickstart"]):
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert "is finished: nothing to do" in done.stdout
    record = json.loads((folder / "runs/quickstart/environment.json").read_text(encoding="utf-8"))
    assert record["working_directory"] == str(folder)

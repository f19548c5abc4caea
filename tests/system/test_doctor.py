"""`scripts/doctor.py` as a user calls it: on a machine in order, and with things broken."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.paths import ROOT

DOCTOR = ROOT / "scripts" / "doctor.py"

Run = Callable[..., CompletedProcess[str]]

# Runs the doctor in a folder of the rank's own.
EACH_ELSEWHERE = """
import os, runpy, sys
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
os.chdir(sys.argv[1] + f"/{rank}")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def by_name(path: Path) -> dict[str, list[dict[str, Any]]]:
    report = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    return found


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``doctor(*arguments)`` does what ``python scripts/doctor.py`` does, in this process, in an empty folder."""
    spec = importlib.util.spec_from_file_location("doctor", DOCTOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.watchdog.stop()  # it would end the tests
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [str(DOCTOR), *map(str, arguments)])
        return int(module.main())

    return run


@pytest.mark.mpi
def test_two_ranks_in_order(mpirun: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "samples").write_bytes(bytes(2 << 20))
    output = tmp_path / "runs"
    finished = mpirun(2, [DOCTOR, "--output", output, "--data", data, "--json", tmp_path / "report.json"], timeout=150)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("world size") == 1  # printed once
    assert "2, as promised by " in finished.stdout
    assert "training can start." in finished.stdout
    found = by_name(tmp_path / "report.json")
    for name in ("Python", "MPI", "MPI collectives", "MPI latency", "ReduceScatterV", "output shared", "data speed"):
        assert all(finding["status"] in ("ok", "note") for finding in found[name]), found[name]
        assert sorted(rank for finding in found[name] for rank in finding["ranks"]) == [0, 1]
    assert "2 ranks: 2 on " in found["hosts"][0]["found"]
    assert "GB/s for an all-reduce of 8 MiB" in found["MPI bandwidth"][0]["found"]
    assert {"GPUs", "NCCL", "CUDA-aware MPI", "threads", "shared memory", "open files"} <= set(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report.json"]  # nothing of the tests is left


def test_what_is_broken_comes_with_its_remedy(run_python: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished = run_python(
        [DOCTOR, "--output", tmp_path / "file" / "runs", "--data", tmp_path / "nowhere", "--json", tmp_path / "r.json"],
        env={"OMPI_COMM_WORLD_SIZE": "4"},
    )
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    found = by_name(tmp_path / "r.json")
    for name, text, remedy in (
        ("output", "cannot be written: Not a directory", "choose another folder"),
        ("data", "cannot be read: No such file or directory", "name the folder that holds the data set"),
        ("world size", "the launcher promised 4 ranks", "set KFAC_DIST_ALLOW_SIZE_MISMATCH=1"),
    ):
        (finding,) = found[name]
        assert finding["status"] == "error"
        assert text in finding["found"]
        assert remedy in finding["remedy"]
    assert "3 errors" in finished.stdout
    assert "remedy: choose another folder" in finished.stdout


@pytest.mark.mpi
def test_one_rank_without_data_is_named(mpirun: Run, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(EACH_ELSEWHERE, encoding="utf-8")
    (tmp_path / "0" / "data").mkdir(parents=True)
    (tmp_path / "0" / "data" / "samples").write_bytes(bytes(100))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "runs").touch()  # a file where a folder should be
    finished = mpirun(2, [program, tmp_path, DOCTOR, "--data", "data"], timeout=150)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    words = " ".join(finished.stdout.split())
    assert "data rank 0: data is readable" in words
    assert "data rank 1: data cannot be read: No such file or directory remedy: " in words
    assert "output rank 1: runs cannot be written: Not a directory remedy: " in words
    assert "output shared every rank sees what rank 0 writes" in words
    assert "Traceback" not in finished.stderr


def test_binding_is_seen(doctor: Callable[..., int], tmp_path: Path) -> None:
    if os.cpu_count() == 1:
        pytest.skip("needs a second core")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        code = doctor("--json", tmp_path / "report.json")
    finally:
        os.sched_setaffinity(0, before)
    assert code == 0
    (finding,) = by_name(tmp_path / "report.json")["threads"]
    assert finding["status"] == "warning"
    assert finding["found"].startswith("bound to one core, of ")
    assert "--bind-to none" in finding["remedy"]


def test_a_check_that_breaks_down_leaves_the_others(
    doctor: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no idea")

    for name in ("os.statvfs", "kfac_dist.doctor.network.measure_network", "kfac_dist.doctor.software.find_mpirun"):
        monkeypatch.setattr(name, broken)
    assert doctor("--json", tmp_path / "report.json") == 0
    found = by_name(tmp_path / "report.json")
    for name in ("output", "shared memory", "MPI collectives", "MPI"):
        (finding,) = found[name]
        assert (finding["status"], finding["remedy"] != "") == ("warning", True)
        assert finding["found"] == "could not be checked: ZeroDivisionError: no idea"
    assert found["open files"]


@pytest.mark.parametrize("broken", ["torch", "mpi4py"])
def test_what_cannot_be_loaded_is_a_finding(broken: str, run_python: Run, tmp_path: Path) -> None:
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise OSError('libx.so: cannot open shared object file')")
    finished = run_python([DOCTOR], env={"PYTHONPATH": str(tmp_path)})
    assert finished.returncode == 2
    assert "torch or MPI cannot be loaded: OSError: libx.so" in finished.stdout
    assert "remedy: scripts/setup.sh" in finished.stdout
    assert "ok       Python" in finished.stdout
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--json", "/dev/null/x"], "--json /dev/null/x cannot be written: Not a directory; choose another path"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(*arguments) == 2
    assert words in capsys.readouterr().err


def test_help(doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--help") == 0
    text = capsys.readouterr().out
    for word in ("--data", "--output", "--json", "mpirun -n P"):
        assert word in text

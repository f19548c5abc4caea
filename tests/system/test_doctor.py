"""`scripts/doctor.py` as a user calls it: on a machine in order, and with things broken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from kfac_dist.communicator import create_communicator
from kfac_dist.doctor.examine import examine
from kfac_dist.doctor.findings import HangGuard, exit_code
from tests.paths import ROOT

DOCTOR = ROOT / "scripts" / "doctor.py"
Run = Callable[..., CompletedProcess[str]]

# Runs the doctor in a folder of the rank's own.
EACH_ELSEWHERE = (
    "import os, runpy, sys; os.chdir(os.path.join(sys.argv.pop(1), os.environ['OMPI_COMM_WORLD_RANK'])); "
    f"runpy.run_path({str(DOCTOR)!r}, run_name='__main__')"
)


def by_name(path: Path) -> dict[str, list[dict[str, Any]]]:
    report = json.loads(path.read_text(encoding="utf-8"))
    names = {finding["name"] for finding in report["findings"]}
    return {name: [finding for finding in report["findings"] if finding["name"] == name] for name in names}


@pytest.mark.mpi
def test_two_ranks_in_order(mpirun: Run, tmp_path: Path) -> None:
    output, data = tmp_path / "runs", tmp_path / "data"
    (data / "train").mkdir(parents=True)
    finished = mpirun(2, [DOCTOR, "--output", output, "--data", data, "--json", tmp_path / "report.json"], timeout=150)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("world size") == 1  # printed once
    assert "2, as promised by " in finished.stdout
    assert "training can start." in finished.stdout
    found = by_name(tmp_path / "report.json")
    for name in ("software", "launcher", "world size", "MPI", "GPUs", "output", "data", "network"):
        assert all(finding["status"] in ("ok", "note") for finding in found[name]), found[name]
        assert sorted(rank for finding in found[name] for rank in finding["ranks"]) == [0, 1]
    assert "2 ranks: 2 on " in found["hosts"][0]["found"]
    assert " µs for one value, " in found["network"][0]["found"]
    usable = f"1 per rank, {len(os.sched_getaffinity(0))} of the host's {os.cpu_count()} cores to run on"
    assert found["threads"][0]["found"].startswith(usable)
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
    (tmp_path / "0" / "data" / "train").mkdir(parents=True)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "runs").touch()  # a file where a folder should be
    finished = mpirun(2, ["-c", EACH_ELSEWHERE, tmp_path, "--data", "data"], timeout=150)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    words = " ".join(finished.stdout.split())
    assert "data rank 0: data is readable" in words
    assert "data rank 1: data cannot be read: No such file or directory remedy: " in words
    assert "output rank 1: runs cannot be written: Not a directory remedy: " in words
    assert "Traceback" not in finished.stderr


def test_a_check_that_breaks_down_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no idea")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the check sets this process's threads
    for name in ("machine.shutil.disk_usage", "ranks.measure_network", "software.find_mpirun"):
        monkeypatch.setattr(f"kfac_dist.doctor.{name}", broken)
    communicator = create_communicator("reduce", "mpi", torch.device("cpu"))
    findings = examine(communicator, tmp_path / "runs", None, HangGuard(0))
    assert exit_code(findings) == 0
    for name in ("output", "network", "MPI"):
        (finding,) = [finding for finding in findings if finding.name == name]
        assert (finding.status, finding.remedy != "") == ("warning", True)
        assert finding.found == "could not be checked: ZeroDivisionError: no idea"
    assert {"software", "threads", "GPUs"} <= {finding.name for finding in findings}


@pytest.mark.parametrize("broken", ["torch", "mpi4py"])
def test_what_cannot_be_loaded_is_a_finding(broken: str, run_python: Run, tmp_path: Path) -> None:
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise OSError('libx.so: cannot open shared object file')")
    finished = run_python([DOCTOR], env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert finished.returncode == 2
    assert "torch or MPI cannot be loaded: OSError: libx.so" in finished.stdout
    assert "remedy: scripts/setup.sh" in finished.stdout
    assert "ok       software  Python" in finished.stdout
    assert "Traceback" not in finished.stderr


def test_wrong_arguments(run_python: Run) -> None:
    for arguments, words in (
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--json", "/dev/null/x"], "--json /dev/null/x cannot be written: Not a directory; choose another path"),
    ):
        finished = run_python([DOCTOR, *arguments])
        assert (finished.returncode, words in finished.stderr) == (2, True), finished.stderr
        assert "Traceback" not in finished.stderr

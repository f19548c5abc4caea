"""Studies as a user runs them: to the end, killed in the middle, changed, failing, and with more seeds for the best."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from kfac_dist.errors import InputError
from kfac_dist.runs.environment import cpu_model
from kfac_dist.study.claims import claim_trial, count_deaths
from kfac_dist.study.command import main
from kfac_dist.study.definition import load_study
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.trial_run import run_trial
from tests.paths import ROOT
from tests.unit.study.studies import write_study

Command = Callable[..., CompletedProcess[str]]
QUIET = {"KFAC_DIST_PROGRESS": "off"}


@pytest.fixture
def study(run_python: Callable[..., CompletedProcess[str]]) -> Command:
    """``study("run", …)``: the command to its end."""

    def run(*arguments: str | Path, progress: str = "off") -> CompletedProcess[str]:
        command = ["-m", "kfac_dist.study", *map(str, arguments)]
        return run_python(command, env={"KFAC_DIST_PROGRESS": progress}, timeout=120)

    return run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the workers and here, or sums differ in the last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``start("run", …)``: the command in the background; killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str | Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kfac_dist.study", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"})
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def results(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same each time that a trial is run."""
    curve = [{key: value for key, value in point.items() if key != "seconds"} for point in result["curve"]]
    return {key: value for key, value in result.items() if key not in ("seconds", "cpu_seconds")} | {"curve": curve}


def reference(folder: Path, index: int, place: Path) -> dict[str, Any]:
    """The result of a trial that is run here, at one go."""
    plan, trials = StudyFolder(folder).read_plan()
    trial = trials[index]
    assert trial.parameters is not None
    assert trial.config is not None
    return run_trial(plan, trial, trial.parameters, trial.config, place / str(index), 0, lambda: False, lambda: None)


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)
    return found


def trained(folder: Path) -> list[int]:
    """Indices of all trials in the order in which the workers' logs say that they were begun."""
    lines = [line for path in (folder / "workers").iterdir() for line in path.read_text().splitlines()]
    return [int(line.split("INFO trial ")[1].split()[0]) for line in lines if "INFO trial " in line]


def test_two_workers_and_more_seeds_for_the_best(
    tmp_path: Path, study: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, {"best": {"seeds": [1, 2]}, "batch_sizes": [256]})
    folder = tmp_path / "study"
    finished = study("run", path, "--folder", folder, "--workers", "2", progress="lines")
    assert finished.returncode == 0, finished.stderr
    assert "8 of 8 trials are finished" in finished.stdout
    assert "8 of 8 trials," in finished.stderr
    assert sorted(trained(folder)) == list(range(8))
    found = results(folder)
    assert {result["status"] for result in found.values()} == {"done"}
    for cell in (range(4), range(4, 8)):
        first, second, *more = (found[index] for index in cell)
        best = max((first, second), key=lambda result: result["final"]["test_top1"])
        assert [(result["seed"], result["parameters"]) for result in more] == [
            (1, best["parameters"]),
            (2, best["parameters"]),
        ]
        assert more[0]["final"] != more[1]["final"]
    result = found[4]
    assert (result["model"], result["optimizer"], result["batch_size"], result["seed"]) == (
        "digits_cnn",
        "kfac",
        256,
        0,
    )
    assert result["parameters"] == {"learning_rate": 0.03, "damping": 0.01}
    assert (result["iterations"], result["epochs"]) == (4, 2.0)
    assert [point["iteration"] for point in result["curve"]] == [2, 4]
    assert 0 < result["final"]["test_top1"] <= 1
    assert set(result["iterations_to"]) == {"train_loss<=2", "test_top1>=0.3"}
    assert result["environment"]["threads"] == 1
    assert not list((folder / "trials").glob("*/run"))
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}
    assert main(["run", "--folder", str(folder)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "results").iterdir()} == before
    changed = write_study(tmp_path, {"best": {"seeds": [1, 2]}, "batch_sizes": [256], "targets": None})
    assert main(["run", str(changed), "--folder", str(folder)]) == 2
    refusal = capsys.readouterr().err
    assert "holds another study" in refusal
    assert "targets: " in refusal


def test_a_trial_on_the_cpu_of_a_machine_with_a_gpu_names_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: it named the GPU."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    assert reference(folder.path, 0, tmp_path)["environment"]["machine"] == cpu_model()


LONG = {
    "batch_sizes": [128],
    "budget": {"rule": "fixed_epochs", "epochs": 30},
    "recipe/checkpoint": {"every_epochs": 1, "keep": 1, "keep_best": False},
}


def test_killed_in_the_middle(tmp_path: Path, study: Command, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """A worker is killed and replaced; then the command itself is, and its worker ends; then all is finished."""
    path, folder = write_study(tmp_path, LONG), tmp_path / "study"
    first = start("run", path, "--folder", folder, "--only", "index=2")

    def has_checkpoint(claim: int) -> bool:
        manifests = list((folder / "trials/00002/run/checkpoints").glob("iteration-*/manifest.json"))
        return bool(manifests) and (folder / f"trials/00002/claims/{claim}/owner.json").exists()

    def worker(claim: int) -> int:
        return int(json.loads((folder / f"trials/00002/claims/{claim}/owner.json").read_text())["pid"])

    wait_for(lambda: has_checkpoint(0))
    os.kill(worker(0), signal.SIGKILL)
    wait_for(lambda: (folder / "trials/00002/claims/1/owner.json").exists())
    second = worker(1)
    first.kill()
    first.wait()
    # The worker sees that its parent is gone, saves what it trains and gives it back, or has just finished it.
    wait_for(lambda: not Path(f"/proc/{second}").exists() or Path(f"/proc/{second}/stat").read_text().split()[2] == "Z")
    finished = study("run", path, "--folder", folder, "--only", "index=2")
    assert finished.returncode == 0, finished.stderr
    found = results(folder)
    assert sorted(found) == [2]
    assert without_times(found[2]) == without_times(reference(folder, 2, tmp_path / "reference"))
    logs = "".join(path.read_text() for path in (folder / "workers").iterdir())
    assert "resumed at iteration" in logs


def test_stopped_by_a_signal(tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    path, folder = write_study(tmp_path, LONG), tmp_path / "study"
    running = start("run", path, "--folder", folder, "--only", "index=2")
    metrics = folder / "trials/00002/run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)  # it trains: before, there is nothing to save
    running.terminate()
    assert running.wait(60) == 75
    if not results(folder):  # it may have been quicker
        assert (folder / "trials/00002/claims/0/released").exists()
        assert list((folder / "trials/00002/run/checkpoints").glob("iteration-*/manifest.json"))


def test_failed_trials_are_told_and_retried(tmp_path: Path, study: Command, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "digits_cnn", "pretrained": str(tmp_path / "missing.safetensors")}
    changes = {"recipe/model": model, "batch_sizes": [256]}
    path, folder = write_study(tmp_path, changes), tmp_path / "study"
    failed = study("run", path, "--folder", folder, "--only", "optimizer=sgd")
    assert failed.returncode == 3
    assert "trial 0 failed: kfac_dist.errors." in failed.stdout
    assert "missing.safetensors" in failed.stdout
    assert {result["status"] for result in results(folder).values()} == {"failed"}
    assert claim_trial(folder / "trials/00000", 60) is not None, "its worker is gone"
    assert main(["retry", "--folder", str(folder), "--only", "index=0"]) == 0
    assert capsys.readouterr().out == "1 failed trials will be run again: 0\n"
    assert sorted(results(folder)) == [1]
    assert count_deaths(folder / "trials/00000") == 0
    assert main(["status", "--folder", str(folder)]) == 0
    assert "1 of 4 trials are finished" in capsys.readouterr().out


def test_data_that_are_missing_are_told_before_any_trial(tmp_path: Path, study: Command) -> None:
    changes = {"recipe/data": {"name": "digits", "train_limit": 512, "eval_limit": 1000}}
    folder = tmp_path / "study"
    ended = study("run", write_study(tmp_path, changes), "--folder", folder)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: data.eval_limit must be <= 359")
    assert results(folder) == {}


def test_a_worker_that_cannot_write_is_a_failure(tmp_path: Path, study: Command) -> None:
    folder = tmp_path / "study"
    assert main(["plan", str(write_study(tmp_path)), "--folder", str(folder)]) == 0
    (folder / "trials/00000").touch()
    ended = study("run", "--folder", folder, "--only", "index=0")
    assert ended.returncode == 1
    assert f"error: a worker ended before its trials were done; see {folder}/workers" in ended.stderr


def test_a_run_that_cannot_be_removed_is_not_taken_for_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder(tmp_path / "study")
    study = load_study(write_study(tmp_path))
    trial = folder.write_plan(study)[0]
    (folder.trial(0) / "run").mkdir(parents=True)
    (folder.trial(0) / "run/metrics.jsonl").touch()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a network's file system may keep files in use
    assert trial.parameters is not None
    assert trial.config is not None
    with pytest.raises(InputError, match=r"00000/run: cannot be removed; delete it, then retry"):
        run_trial(study, trial, trial.parameters, trial.config, folder.trial(0), 0, lambda: False, lambda: None)


def test_a_trial_whose_weights_cannot_be_saved_has_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))
    expected = reference(folder.path, 0, tmp_path / "saved")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kfac_dist.checkpoints.save.write_shard", fail)
    assert without_times(reference(folder.path, 0, tmp_path / "not saved")) == without_times(expected)
    assert expected["status"] == "done"


def test_finished_trials_are_known_by_their_whole_number(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in ("00007.json", "123456.json", "00003.bak.json", ".00004.json.host.1"):
        (tmp_path / "results" / name).touch()
    assert StudyFolder(tmp_path).finished() == {7, 123456}


def test_overrides_may_stand_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = str(write_study(tmp_path)), tmp_path / "study"
    assert main(["plan", path, "--folder", str(folder), "batch_sizes=[128]", "--only", "index=0", "seeds=[5]"]) == 0
    assert {trial.batch_size for trial in StudyFolder(folder).read_plan()[1]} == {128}
    assert {trial.seed for trial in StudyFolder(folder).read_plan()[1]} == {5}
    with pytest.raises(SystemExit, match="2"):
        main(["plan", path, "--folder", str(folder), "more.yaml"])
    assert "unrecognized arguments: more.yaml" in capsys.readouterr().err


def test_diverged_trials_end_early_and_count_as_such(tmp_path: Path) -> None:
    grid = {"learning_rate": {"key": "optimizer.learning_rate", "values": [1e4, 1e30]}}
    path = write_study(tmp_path, {**LONG, "optimizers/sgd/grid": grid})
    folder = tmp_path / "study"
    StudyFolder(folder).write_plan(load_study(path))
    for index in (0, 1):
        result = reference(folder, index, tmp_path / "trials")
        assert result["status"] == "diverged"
        assert result["iterations"] <= 12  # of 240
        assert "training diverged" in result["error"]


def test_a_study_whose_data_are_missing_is_not_planned_by_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect: the folder kept the study without the data's place, and refused the corrected command."""
    data = {"name": "cifar10", "root": str(tmp_path / "nowhere")}
    path = write_study(tmp_path, {"recipe/data": data, "recipe/model/name": "resnet8", "models": ["resnet8"]})
    assert main(["run", str(path), "--folder", str(tmp_path / "study")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["plan"], "plan needs the study's YAML file"),
        (["run"], "holds no study"),
        (["status"], "holds no study"),
        (["run", "missing.yaml"], "missing.yaml: no such file"),
        (["plan", "configs/study/digits.yaml", "--only", "batch=3"], "--only must be key=value, with a key of index,"),
        (["plan", "configs/study/digits.yaml", "batch_sizes=[3]"], "batch_sizes[0] must be a power of two >= 128"),
    ],
)
def test_wrong_commands(arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument if "/" not in argument else str(ROOT / argument) for argument in arguments]
    assert main([*arguments, "--folder", str(tmp_path / "study")]) == 2
    assert problem in capsys.readouterr().err

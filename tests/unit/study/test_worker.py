"""What a worker leaves behind when a signal comes at an awkward moment."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_dist.runs.progress import PROGRESS_VARIABLE
from kfac_dist.study import worker
from kfac_dist.study.claims import claim_trial, count_deaths
from kfac_dist.study.definition import load_study
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.trial_run import TrialTrainer
from kfac_dist.study.trials import Trial
from tests.unit.study.studies import write_study

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worker is this process, which goes on afterwards."""
    monkeypatch.setattr(worker, "_write_to_file", lambda folder, number: None)
    monkeypatch.setenv(PROGRESS_VARIABLE, "off")
    handlers, threads = [signal.getsignal(number) for number in HANDLED], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(HANDLED, handlers, strict=True):
        signal.signal(number, handler)


def and_a_signal(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
    """The function, and a signal to this process before or after it."""

    def both(*arguments: Any, **keywords: Any) -> Any:
        if not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = function(*arguments, **keywords)
        if after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return both


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (StudyFolder, "read_plan", False),
        (worker, "claim_trial", True),
        (worker, "count_deaths", False),
        (worker, "run_trial", False),
        (StudyFolder, "write_result", False),
        (StudyFolder, "write_result", True),
    ],
)
def test_a_worker_that_is_told_to_stop_gives_its_trial_back(
    owner: Any, name: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that it keeps would count as the death of a worker, of which a trial may have three."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))
    monkeypatch.setattr(worker, "run_trial", lambda *arguments: {"index": 0, "status": "done"})
    monkeypatch.setattr(owner, name, and_a_signal(getattr(owner, name), after))
    settings = worker.WorkerSettings(folder.path, os.getpid(), [0], 1, 60.0, waits=False, keeps_runs=True)
    with pytest.raises(SystemExit) as ended:
        worker.work(settings, 0)
    assert ended.value.code == 75
    assert count_deaths(folder.trial(0)) == 0
    assert claim_trial(folder.trial(0), 60.0) is not None
    assert folder.finished() == ({0} if name == "write_result" and after else set())


def settings_for(folder: StudyFolder, selected: list[int], waits: bool) -> worker.WorkerSettings:
    return worker.WorkerSettings(folder.path, os.getpid(), selected, 1, 60.0, waits=waits, keeps_runs=False)


def test_a_result_that_is_deleted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: the worker held the trial, waited for whoever held it, and never ended."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))
    ran: list[int] = []

    def run_trial(study: object, trial: Trial, *more: object) -> dict[str, Any]:
        ran.append(trial.index)
        if ran == [0, 1]:
            folder.result(0).unlink()
        return {"index": trial.index, "status": "done"}

    def wait(seconds: float) -> None:
        if folder.finished() == {1} and len(ran) < 3:
            waited.append(seconds)
            assert len(waited) < 3, "it waits for itself"

    waited: list[float] = []
    monkeypatch.setattr(worker, "run_trial", run_trial)
    monkeypatch.setattr(worker.time, "sleep", wait)
    worker.work(settings_for(folder, [0, 1], waits=True), 0)
    assert ran == [0, 1, 0]
    assert folder.finished() == {0, 1}


def test_a_signal_at_the_end_of_a_trial_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: it was lost, and the worker took the next trial."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path, {"budget": {"rule": "fixed_iterations", "iterations": 2}})))
    monkeypatch.setattr(TrialTrainer, "evaluate", and_a_signal(TrialTrainer.evaluate, after=True))
    with pytest.raises(SystemExit) as ended:
        worker.work(settings_for(folder, [0, 1], waits=False), 0)
    assert ended.value.code == 75
    assert folder.finished() == {0}
    assert folder.read_result(0)["status"] == "done"


def test_a_trial_of_which_no_checkpoint_can_be_used_begins_anew(tmp_path: Path) -> None:
    """Defect: it failed, and again at each retry; only the command `train` must not begin anew unasked."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path, {"budget": {"rule": "fixed_iterations", "iterations": 2}})))
    damaged = folder.trial(0) / "run/checkpoints/iteration-00000001"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    worker.work(settings_for(folder, [0], waits=False), 0)
    assert folder.read_result(0)["status"] == "done"


def test_a_signal_while_a_trial_is_claimed_is_heeded_when_the_claim_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))
    monkeypatch.setattr(Path, "mkdir", and_a_signal(Path.mkdir, after=True))
    settings = worker.WorkerSettings(folder.path, os.getpid(), [0], 1, 60.0, waits=False, keeps_runs=True)
    with pytest.raises(SystemExit) as ended:
        worker.work(settings, 0)
    assert ended.value.code == 75
    (claim,) = (folder.trial(0) / "claims").iterdir()
    assert sorted(path.name for path in claim.iterdir()) == ["owner.json", "released"]


def test_a_worker_that_lost_its_gpu_leaves_the_trial_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: after one CUDA error, which leaves a process without its GPU, all other trials of the worker failed."""
    folder = StudyFolder(tmp_path / "study")
    folder.write_plan(load_study(write_study(tmp_path)))

    def fail(*arguments: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "run_trial", fail)
    child = os.fork()
    if child == 0:
        try:
            worker.work(settings_for(folder, [0, 1], waits=False), 0)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert folder.finished() == set()
    assert [count_deaths(folder.trial(index)) for index in (0, 1)] == [1, 0]

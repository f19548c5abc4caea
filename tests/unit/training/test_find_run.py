"""Which run `--resume` means."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")  # a machine with a GPU may have little else installed

from kfac_dist import create_communicator
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.config.schema import RunConfig
from kfac_dist.errors import InputError
from kfac_dist.training.run_state import find_run
from tests.paths import QUICKSTART


def test_a_jobs_own_run_though_another_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run of the name is another job's, and finished: this job's own is the one to go on with."""
    for name, job in (("a", "7"), ("a-2", "8")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        (tmp_path / name / "environment.json").write_text(json.dumps({"variables": {"SLURM_JOB_ID": job}}))
    (tmp_path / "a-2" / "DONE").touch()
    communicator = create_communicator("reduce", device=torch.device("cpu"))
    config = RunConfig(name="a", output_dir=str(tmp_path))
    assert find_run("auto", config, communicator) == (tmp_path / "a-2", True)
    for job, expected in (("7", (tmp_path / "a", False)), ("8", (tmp_path / "a-2", True)), ("9", (None, False))):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert find_run("job", config, communicator) == expected
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, expected in (("7", (tmp_path / "a", False)), ("9", (tmp_path / "a-2", True))):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert find_run("auto", config, communicator) == expected, "a job that was given it and is queued again"
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(InputError, match="--resume job needs the variable SLURM_JOB_ID"):
        find_run("job", config, communicator)


def test_rank_0_alone_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: without SLURM_JOB_ID, which mpirun's daemons on other hosts lack under ssh, another rank refused it."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    class SecondRank(LocalCommunicator):
        is_main = False

        def gather_bytes(self, message: bytes) -> list[bytes]:
            told.append(message)
            return [b"" if len(told) == 1 else b"/runs/a\n0", message]

    told: list[bytes] = []
    assert find_run("job", RunConfig(name="a", output_dir=str(tmp_path)), SecondRank()) == (Path("/runs/a"), False)
    assert told == [b"", b""]


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    communicator = create_communicator("reduce", device=torch.device("cpu"))
    config = RunConfig(name="a", output_dir=str(tmp_path))
    for wanted in (tmp_path, tmp_path / "nowhere", QUICKSTART):
        with pytest.raises(InputError, match="--resume must be auto, job, or the folder of a run or of a checkpoint"):
            find_run(str(wanted), config, communicator)
    (tmp_path / "metrics.jsonl").touch()
    assert find_run(str(tmp_path), config, communicator) == (tmp_path, False)

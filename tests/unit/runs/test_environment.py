"""The record of software, machine and launch."""

import json
import os
import subprocess
import sys

import numpy as np
import torch

from kfac_dist.runs.environment import describe_environment


def test_environment_names_versions_machine_and_launch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    record = describe_environment("Open MPI v5", ["n1", "n1", "n0"])
    assert record["num_ranks"] == 3
    assert record["ranks_by_host"] == {"n1": 2, "n0": 1}
    assert record["mpi_library"] == "Open MPI v5"
    assert torch.__version__.startswith(record["packages"]["torch"])
    assert record["packages"]["numpy"] == np.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["cpu"]["model"]
    assert record["cpu"]["num_logical"] >= 1
    assert record["variables"]["OMP_NUM_THREADS"] == "3"
    assert record["started"].endswith("+00:00")
    assert "hidden" not in json.dumps(record)


def test_git_state_is_only_that_of_the_checkout_itself(tmp_path):
    from kfac_dist.runs.environment import _git_state

    assert _git_state(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    state = _git_state(tmp_path.resolve())
    assert len(state["commit"]) == 40
    assert state["modified"] is False
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert _git_state(tmp_path.resolve())["modified"] is True
    assert _git_state((tmp_path / "new").resolve()) is None


def test_git_is_asked_without_a_lock_that_a_killed_run_would_leave_behind(tmp_path):
    from kfac_dist.runs.environment import _git_state

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("content")
    git("add", "file")
    git("commit", "-m", "first")
    os.utime(tmp_path / "file", (1, 1))  # the same content, which git would note in its index
    before = (tmp_path / ".git/index").read_bytes()
    assert _git_state(tmp_path.resolve())["modified"] is False
    assert (tmp_path / ".git/index").read_bytes() == before

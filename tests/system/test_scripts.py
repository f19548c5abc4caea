"""scripts/setup.sh, scripts/test.sh and docker/ssh-host.sh with stand-ins for their tools: what they ask for, when."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import ROOT

# Stands for every program of .venv/bin: notes how it was called, and fails where the file `failing` says so.
STUB = """#!/bin/sh
echo "$(basename "$0") $* data=$KFAC_DIST_DATA" >>"$LOG"
case "$*" in *unpack.py*) exec {python} "$@" ;; esac
case "$*" in *"$(cat "$LOG.failing")"*) exit 1 ;; esac
"""
UNPACK = "import pathlib, sys; (pathlib.Path(sys.argv[2]) / sys.argv[1]).mkdir()"
BROKEN = "import sys; sys.exit(f'no {sys.argv[1]} here' if sys.argv[1] == 'cifar10' else 0)"


class Checkout:
    """Scripts with stand-ins in .venv, in a folder beside which others can be put."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "checkout", folder / "log"
        self.beside, self.cache = folder / "beside", folder / "cache/kfac_dist/test-data"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "setup.py", self.root)
        tools = self.root / ".venv/bin"
        tools.mkdir(parents=True)
        for tool in ("python", "ruff", "mypy"):
            (tools / tool).write_text(STUB.format(python=sys.executable))
            (tools / tool).chmod(0o755)
        path = folder / "path"  # no test installs packages of the machine
        path.mkdir()
        shutil.copy(tools / "python", path / "apt-get")
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.env = os.environ | {"LOG": str(self.log), "XDG_CACHE_HOME": str(folder / "cache")}
        self.env["TMPDIR"] = str(self.temporary)
        self.env["PATH"] = f"{path}:{self.env['PATH']}"
        self.env.pop("KFAC_DIST_DATA", None)
        self.failing("nothing fails")

    def failing(self, words: str) -> None:
        self.log.with_name("log.failing").write_text(words)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(
            ["bash", *command], cwd=self.root, env=self.env | env, capture_output=True, text=True, timeout=60
        )

    def calls(self, word: str) -> list[str]:
        return [line for line in self.log.read_text(encoding="utf-8").splitlines() if word in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def write_unpack(checkout: Checkout, text: str) -> None:
    (checkout.beside / "data").mkdir(parents=True, exist_ok=True)
    (checkout.beside / "data/unpack.py").write_text(text)


def test_tests_run_without_real_data(checkout: Checkout) -> None:
    finished = checkout.run("scripts/test.sh", "-k", "config")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert checkout.calls("-m pytest") == ["python -m pytest -k config data="]
    assert checkout.calls("-m mkdocs") == ["python -m mkdocs build --strict data="]
    assert not checkout.cache.exists()


def test_real_data_beside_the_checkout_are_unpacked_once(checkout: Checkout) -> None:
    write_unpack(checkout, UNPACK)
    for times in (3, 0):
        finished = checkout.run("scripts/test.sh")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert len(checkout.calls("unpack.py")) == times
        assert all(call.endswith(f"data={checkout.cache}") for call in checkout.calls("-m pytest"))
    assert (checkout.cache / "imagenette-mini").is_dir()
    checkout.run("scripts/test.sh", KFAC_DIST_DATA="/elsewhere")
    assert all(call.endswith("data=/elsewhere") for call in checkout.calls("-m pytest"))


def test_data_that_cannot_be_unpacked_are_told_and_tried_again(checkout: Checkout) -> None:
    write_unpack(checkout, BROKEN)
    for times in (3, 1):
        finished = checkout.run("scripts/test.sh")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "could not unpack cifar10" in finished.stderr
        assert len(checkout.calls("unpack.py")) == times


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="DALI has wheels for Linux only")
def test_dali_is_installed_for_the_tests_and_done_without_where_that_fails(checkout: Checkout) -> None:
    checkout.failing("[dali]")
    finished = checkout.run("scripts/test.sh")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "warning: the extra dali could not be installed" in finished.stdout
    assert len(checkout.calls("-m pytest")) == 2
    checkout.failing("nothing fails")
    for times in (1, 0):  # tried again, and not once it is there
        finished = checkout.run("scripts/test.sh")
        assert "warning" not in finished.stdout
        assert len(checkout.calls("[dali]")) == times
        assert len(checkout.calls("[dev")) == 0


def test_what_must_be_there_is_not_only_tried(checkout: Checkout) -> None:
    checkout.failing("[dev")
    finished = checkout.run("scripts/test.sh")
    assert finished.returncode == 1
    assert "pip failed" in finished.stderr
    assert checkout.calls("-m pytest") == []


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        ("format --check", "format"),
        ("-m mkdocs", "site"),
        ("--ignore", "tests of the package"),
        ("pytest tests/cluster", "tests of commands, cluster and GPU"),
    ],
)
def test_a_stage_that_fails_is_named_and_the_others_run(words: str, stage: str, checkout: Checkout) -> None:
    checkout.failing(words)
    finished = checkout.run("scripts/test.sh")
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[-1] == f"FAILED: {stage}"
    folders = ("tests/cluster", "tests/gpu", "tests/system")
    parts = [" ".join(f"--ignore={folder}" for folder in folders), " ".join(folders)]
    assert sorted(checkout.calls("-m pytest")) == [f"python -m pytest {part} data=" for part in parts]
    assert list(checkout.temporary.iterdir()) == []


def test_a_container_that_waits_for_others_lets_them_make_or_find_the_keys(tmp_path: Path) -> None:
    tools = {"ssh-keygen": 'for word; do file=$word; done; echo k k >"$file"; echo k k >"$file.pub"', "ssh": "exit 1"}
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = [ROOT / "docker/ssh-host.sh"]
    with subprocess.Popen([*command, "run", "node2", "--", "true"], env=env) as first:
        try:
            while not (tmp_path / ".ssh/config").exists():
                assert first.poll() is None
                time.sleep(0.05)
            second = subprocess.run([*command, "help"], env=env, stderr=subprocess.PIPE, text=True, timeout=20)
            assert first.poll() is None, "it still waits for node2, which does not answer"
        finally:
            first.kill()
    assert second.returncode == 2
    assert "docker/ssh-host.sh serve" in second.stderr

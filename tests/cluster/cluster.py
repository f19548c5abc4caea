"""A Slurm of the test's own on this host: munged, slurmctld and a slurmd for each of two nodes, without privileges.

Everything lies in one folder, the ports are free ones, and nothing else on the machine is read or changed. Containers
have neither cgroups nor systemd, so processes are tracked by /proc, tasks are not bound, and there is no accounting.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.paths import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIGURATION = """
ClusterName=kfac
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=5
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=16 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""
SBIN = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_LAUNCHERS = ("OMPI_", "PMIX_", "PRTE_", "SLURM_", "SBATCH_", "KFAC_DIST_")  # of whatever started the tests
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=SBIN) is None]


class Cluster:
    """Two nodes, each of 16 CPUs and of 2 GPUs that do not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        self.env = ours | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": SBIN,
            "OMP_NUM_THREADS": "1",
            "KFAC_DIST_PYTHON": sys.executable,
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait for both nodes.

        Raises:
            TimeoutError: If they do not come up.
        """
        folder = self.folder
        for name in ("state", "spool-node1", "spool-node2", "tmp-node1", "tmp-node2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)
        for number in (0, 1):
            (folder / f"gpu{number}").touch()  # Slurm asks only that the file exists
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_for((folder / "munge.socket").exists, "munged's socket", 20)
        self._start("slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in ("node1", "node2"):
            self._start("slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        wait_for(self._is_ready, f"two idle nodes; see the logs in {folder}", 40)

    def cancel_all(self) -> None:
        """Cancel what still runs, and wait for its end."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        wait_for(lambda: not self.call("squeue", "--noheader", check=False).strip(), "the end of all jobs", 30)

    def stop(self) -> None:
        """End the daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            daemon.wait(20)

    def logs(self) -> str:
        """The daemons' last errors."""
        lines = [line for file in sorted(self.folder.glob("*.err")) for line in file.read_text("utf-8").splitlines()]
        return " | ".join([line for line in lines if "rror" in line and "state file" not in line][-5:])

    def call(self, *command: str | Path, check: bool = True, **env: str) -> str:
        """Run one of Slurm's commands; returns what it printed."""
        done = subprocess.run(command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, flags: Sequence[str], arguments: Sequence[str | Path], **env: str) -> "Job":
        """Submit a script of scripts/slurm from the checkout, as a user does."""
        output = f"--output={self.folder}/%j.out"
        path = ROOT / "scripts/slurm" / script
        return Job(self, int(self.call("sbatch", "--parsable", output, *flags, path, *arguments, **env)))

    def has_pmix(self) -> bool:
        """Whether srun can start MPI's ranks."""
        return "pmix" in self.call("srun", "--mpi=list", check=False)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.err").open("ab") as error:
            self._daemons.append(subprocess.Popen(command, env=self.env, stdout=error, stderr=error))

    def _is_ready(self) -> bool:
        return self.call("sinfo", "--noheader", "--Node", "--format=%t", check=False).split() == ["idle", "idle"]


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int | str) -> None:
        self.cluster, self.number = cluster, number

    def show(self) -> Mapping[str, str]:
        """What Slurm knows of it."""
        text = self.cluster.call("scontrol", "show", "job", "--oneliner", str(self.number))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def log(self) -> str:
        path = self.cluster.folder / f"{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, seconds: float = 240) -> Mapping[str, str]:
        """Wait until it is finished.

        After a requeue Slurm holds a job back for two minutes; this lets it start after two seconds. At once, its
        script may not be found: the node may still be removing what the first start left. No second start is to meet
        its time limit.
        """
        held_since = None

        def is_finished() -> bool:
            nonlocal held_since
            shown = self.show()
            if (shown["JobState"], shown["Reason"]) != ("PENDING", "BeginTime"):
                held_since = None
            elif held_since is None:
                held_since = time.monotonic()
            elif time.monotonic() > held_since + 2:
                changes = (f"JobId={self.number}", "StartTime=now", "TimeLimit=30")
                self.cluster.call("scontrol", "update", *changes, check=False)
            return shown["JobState"] in FINISHED

        try:
            wait_for(is_finished, f"the end of job {self.number}", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.show()}\n{self.log}") from None
        return self.show()


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Look four times a second whether a condition holds.

    Raises:
        TimeoutError: If it does not within that time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.25)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

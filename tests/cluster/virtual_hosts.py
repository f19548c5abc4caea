"""Hosts made of Linux namespaces: each has an address, a name, processes, /dev/shm and an sshd of its own.

They share this machine's files, as hosts of a cluster share a file system. Their network is a bridge in a further
namespace, so nothing is to be seen of it outside.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

SUBNET = "10.77.0.0/24"
SSH_PORT = 2022

_PRIVATE = "/dev/shm"
"""A folder of each host's own. Open MPI's daemons name theirs by process number, which the hosts have in common."""


def reason_not_possible() -> str | None:
    """Why this machine cannot make such hosts, or None; the packages openssh-server and iproute2 are there."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"kfac-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode == 0:
        tried = subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "--pid", "--fork", "hostname", name],
            capture_output=True,
            text=True,
        )
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"may not make network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class VirtualHosts:
    """Hosts ``node1``, ``node2``, … while entered; root on each may log in to each by ssh."""

    def __init__(self, number: int, folder: Path) -> None:
        """Set up.

        Args:
            number: Of hosts.
            folder: For keys and settings; not needed by anything else.
        """
        self.names = [f"node{index}" for index in range(1, number + 1)]
        self.ssh_config = folder / "ssh_config"
        self._folder = folder
        self._prefix = f"kfac{os.getpid()}"
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "VirtualHosts":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_keys()
        try:
            self._make_network()
            for name in self.names:
                self._start_sshd(name)
            for name in self.names:
                self._wait_for_sshd(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            self.power_off(name)
        for name in ("switch", *self.names):
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._namespace(name), ignore_errors=True)

    def command_on(self, name: str, command: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
        """The command as someone logged in to the host runs it; ends with the host."""
        init = subprocess.run(
            ["pgrep", "--parent", str(self._sshd[name].pid)], capture_output=True, text=True, check=True
        ).stdout.strip()
        enter = ["nsenter", "--target", init, "--net", "--uts", "--mount", "--pid", f"--wd={os.getcwd()}"]
        return [*enter, "env", f"TMPDIR={_PRIVATE}", *command]

    def cut_off(self, name: str) -> None:
        """As if its network cable were pulled: nothing arrives any more, and nobody is told."""
        _ip("-n", self._namespace("switch"), "link", "set", name, "down")

    def reconnect(self, name: str) -> None:
        _ip("-n", self._namespace("switch"), "link", "set", name, "up")

    def open_only(self, *ports: str) -> str | None:
        """Refuse new connections to other ports from now on, as a firewall does.

        Args:
            ports: Numbers, or ranges such as 10000:10999; ssh's stays open.

        Returns:
            None, or why this is not possible here.
        """
        for name in self.names:
            firewall = ["ip", "netns", "exec", self._namespace(name), "iptables", "--append", "INPUT", "-i", "eth0"]
            rules = [["--dport", port, "-j", "ACCEPT"] for port in (str(SSH_PORT), *ports)]
            for rule in (*rules, ["--syn", "-j", "REJECT"]):
                done = subprocess.run([*firewall, "-p", "tcp", *rule], capture_output=True, text=True)
                if done.returncode != 0:
                    return f"iptables does not work here: {done.stderr.strip()}"
        return None

    def open_all(self) -> None:
        """Take `open_only` back."""
        for name in self.names:
            subprocess.run(["ip", "netns", "exec", self._namespace(name), "iptables", "--flush", "INPUT"], check=True)

    def power_off(self, name: str) -> None:
        """End all processes of the host at once."""
        sshd = self._sshd.pop(name, None)
        if sshd is not None:
            sshd.send_signal(signal.SIGKILL)  # unshare's --kill-child ends its child, and with it the PID namespace
            sshd.wait()

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make_keys(self) -> None:
        for key in ("id", "host"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", self._folder / key], check=True
            )
        sshd = {
            "Port": SSH_PORT,
            "HostKey": self._folder / "host",
            "AuthorizedKeysFile": self._folder / "id.pub",
            "PermitRootLogin": "prohibit-password",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "SetEnv": f"TMPDIR={_PRIVATE}",
        }
        ssh = {
            "Port": SSH_PORT,
            "IdentityFile": self._folder / "id",
            "BatchMode": "yes",
            "ConnectTimeout": 5,
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
        }
        for path, settings in ((self._folder / "sshd_config", sshd), (self.ssh_config, ssh)):
            path.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))

    def _make_network(self) -> None:
        switch = self._namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        addresses = {name: SUBNET.replace("0/24", str(index)) for index, name in enumerate(self.names, 1)}
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        for name, address in addresses.items():
            host = self._namespace(name)
            _ip("netns", "add", host)
            _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host, "link", "set", device, "up")
            settings = Path("/etc/netns") / host  # "ip netns exec" lays these over /etc
            settings.mkdir(parents=True)
            (settings / "hosts").write_text(hosts)

    def _start_sshd(self, name: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = f"/usr/sbin/sshd -D -E {self._folder}/{name}.log -f {self._folder}/sshd_config"
        script = f"hostname {name} && mount -t tmpfs tmpfs {_PRIVATE} && exec {sshd}"
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._sshd[name] = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace(name), *unshare, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_for_sshd(self, name: str) -> None:
        for _ in range(50):
            asked = subprocess.run(
                ["ip", "netns", "exec", self._namespace(self.names[0]), "ssh", "-F", self.ssh_config, name, "hostname"],
                capture_output=True,
                text=True,
            )
            if asked.stdout.strip() == name:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name}'s sshd does not answer: {asked.stderr}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

"""Builds docker/Dockerfile without a Docker engine: buildah, over a Debian that debootstrap makes.

Where packages come from is read from this machine's own settings of apt and pip.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT

BASE = "localhost/kfac_base"
IMAGE = "localhost/kfac_dist:cpu"
GIGABYTES = 8
"""Of free disk that the build may take for a while; 4 were measured."""

_PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout")


def reason_not_possible(folder: Path) -> str | None:
    """Why the image cannot be built here, or None; buildah and debootstrap are there."""
    if os.geteuid() != 0:
        return "building an image over a base of one's own needs root"
    if _debian_release() != "bookworm":
        return "the image's base is Debian 12, which is made from the settings of apt: this is not Debian 12"
    if shutil.disk_usage(folder).free < GIGABYTES * 1e9:
        return f"building the image needs {GIGABYTES} GB of free disk"
    (torch,) = [line for line in lock_lines("cpu") if line.startswith("torch==")]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    target = ["--python-version", "3.11", "--only-binary", ":all:", "--target", str(folder / "nothing")]
    if subprocess.run([*pip, *target, torch], capture_output=True, timeout=120).returncode != 0:
        return f"pip finds no {torch} here: PyPI has no CPU wheels of torch, name PyTorch's index of them to pip"
    return None


def lock_lines(variant: str) -> list[str]:
    text = (ROOT / f"docker/requirements-{variant}.lock").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


class Buildah:
    """buildah with a store of its own, which is gone after `remove`.

    Attributes:
        build_seconds: What `build` took, without the base.
    """

    def __init__(self, folder: Path) -> None:
        self.build_seconds = 0.0
        self._folder = folder
        self._store = ["--root", f"{folder}/storage", "--runroot", f"{folder}/run"]

    def command(self, *arguments: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
        return ["buildah", *self._store, *arguments]

    def do(self, *arguments: str | os.PathLike[str], timeout: float = 60) -> str:
        """Run buildah; returns what it says. It must succeed."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def make_base(self) -> None:
        """A Debian as small as debian:bookworm-slim, from this machine's mirror."""
        root = self._folder / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", _debian_release(), root, _debian_mirror()],
            check=True,
            capture_output=True,
            timeout=600,
        )
        container = self.do("from", "scratch")
        self.do("add", "--quiet", container, root, "/")
        self.do("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)

    def build(self) -> None:
        """The CPU image, with the machine's settings as the secrets that the Dockerfile asks for."""
        began = time.monotonic()
        variables = {"BASE": BASE, "VARIANT": "cpu", "REVISION": "of-a-test"}
        arguments = [word for name, value in variables.items() for word in ("--build-arg", f"{name}={value}")]
        self.do(
            *("bud", "--format", "docker", "--isolation", "chroot", "--file", "docker/Dockerfile", "--tag", IMAGE),
            *arguments,
            *self._package_settings(),
            ".",
            timeout=900,
        )
        self.build_seconds = time.monotonic() - began

    def image(self) -> dict[str, Any]:
        """The image's settings, as Docker has them."""
        settings: dict[str, Any] = json.loads(self.do("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        return settings

    def start(self, *options: str) -> str:
        """A new container of the image; returns its name."""
        return self.do("from", *options, IMAGE)

    def run(self, container: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as the image's user, without the entry point."""
        return subprocess.run(
            self.command("run", "--isolation", "chroot", *options, container, "--", *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def remove(self) -> None:
        for arguments in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run(self.command(*arguments), capture_output=True, timeout=120)
        subprocess.run(["umount", self._folder / "storage/overlay"], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _package_settings(self) -> list[str]:
        """Options that bring this machine's settings of apt and pip, its certificates and its folders of wheels."""
        found = {name: _pip_setting(name) for name in _PIP_SETTINGS}
        pip = self._folder / "pip.conf"
        pip.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items() if value))
        apt = self._folder / "apt.conf"
        dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
        apt.write_text("".join(f"{line}\n" for line in dumped.splitlines() if line.startswith("Acquire::http")))
        options = ["--secret", f"id=pip.conf,src={pip}", "--secret", f"id=apt.conf,src={apt}"]
        certificates = _pip_setting("cert")
        if certificates:
            options += ["--secret", f"id=ca,src={certificates}"]
        for word in " ".join(filter(None, found.values())).split():
            path = word.removeprefix("file://").removesuffix("/simple")  # an index's files lie beside it
            if os.path.isdir(path):
                options += ["--volume", f"{path}:{path}:ro"]
        return options


def _pip_setting(name: str) -> str:
    variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if variable is not None:
        return variable
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True
    )
    return " ".join(asked.stdout.split()) if asked.returncode == 0 else ""


def _debian_release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines() if Path("/etc/os-release").exists() else []
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    return settings.get("VERSION_CODENAME", "").strip('"') if settings.get("ID") == "debian" else ""


def _debian_mirror() -> str:
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mirrors = [line.split()[2] for line in listed.splitlines() if line.split()[:2] == [_debian_release(), "main"]]
    assert mirrors, f"apt has no source of Debian {_debian_release()} main"
    return mirrors[0]

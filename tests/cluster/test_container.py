"""docker/Dockerfile, really built for CPUs, and what runs in it; docker/compose.yaml as two containers over ssh."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.cluster.debian import reason_packages_are_missing
from tests.cluster.image_build import IMAGE, Buildah, lock_lines, reason_not_possible
from tests.cluster.virtual_hosts import VirtualHosts
from tests.cluster.virtual_hosts import reason_not_possible as reason_no_hosts
from tests.paths import ROOT

pytestmark = [pytest.mark.container, pytest.mark.timeout(1200)]  # the image is built in the first that needs it

USER_ID = 1000
MAX_GIGABYTES = 1.6


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    reason = reason_packages_are_missing("buildah")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("buildah")
    buildah = Buildah(folder)
    try:
        yield buildah
    finally:
        buildah.remove()


@pytest.fixture(scope="module")
def built(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    reason = reason_packages_are_missing("debootstrap") or reason_not_possible(tmp_path_factory.getbasetemp())
    if reason:
        pytest.skip(reason)
    buildah.make_base()
    buildah.build()
    return buildah


@pytest.fixture
def container(built: Buildah) -> Iterator[str]:
    name = built.start()
    yield name
    built.do("rm", name)


@pytest.mark.long
def test_what_the_image_says_of_itself(built: Buildah) -> None:
    image = built.image()
    assert image["User"] == "kfac"
    assert image["WorkingDir"] == "/kfac_dist"
    assert image["Healthcheck"]["Test"] == ["CMD", "python", "scripts/doctor.py"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image["Labels"].items()}
    assert labels["title"] == "kfac_dist"
    assert labels["licenses"] == "MIT"
    assert labels["revision"] == "of-a-test"
    assert labels["base.name"] == "localhost/kfac_base"
    assert "(cpu)" in labels["description"]


@pytest.mark.long
def test_what_is_in_the_image(built: Buildah, container: str) -> None:
    """No compiler, no package lists or caches, no key, nothing of this machine's settings; and what the lock names."""
    root = Path(built.do("mount", container))
    try:
        for name in ("cc", "gcc", "g++", "c++", "make", "ld", "as", "git"):
            assert not any((root / place / name).exists() for place in ("usr/bin", "usr/local/bin", "opt/venv/bin")), (
                name
            )
        for pattern in ("var/lib/apt/lists/*", "var/cache/apt/*", "root/.cache", "home/kfac/.cache", "build", "wheels"):
            assert not list(root.glob(pattern)), pattern
        for pattern in ("etc/ssh/ssh_host_*", "home/kfac/.ssh/*", "etc/pip.conf", "run/secrets/*"):
            assert not list(root.glob(pattern)), pattern
        assert not (root / "etc/apt/apt.conf.d/90build").exists()
        (packages,) = (root / "opt/venv/lib").glob("python3*/site-packages")
        assert not list(packages.rglob("__pycache__"))
        for line in lock_lines("cpu"):
            name, _, version = line.partition("==")
            assert (packages / f"{name.replace('-', '_')}-{version}.dist-info").exists(), line
        used = subprocess.run(["du", "-sxB1", root], capture_output=True, text=True, check=True).stdout
    finally:
        built.do("umount", container)
    gigabytes = int(used.split()[0]) / 1e9
    print(f"the image has {gigabytes:.2f} GB and was built in {built.build_seconds:.0f} s over the base")
    assert gigabytes < MAX_GIGABYTES


@pytest.mark.long
def test_what_docker_run_does(built: Buildah, container: str) -> None:
    """Entry point and command as they stand in the image: the quickstart on two ranks, not as root."""
    image = built.image()
    assert built.run(container, "id", "--user").stdout.strip() == str(USER_ID)
    finished = built.run(container, *image["Entrypoint"], *image["Cmd"])
    assert finished.returncode == 0, finished.stderr
    assert "2 ranks over MPI" in finished.stderr
    listed = built.run(container, "stat", "--format", "%u %n", "runs/quickstart/DONE")
    assert listed.stdout.split() == [str(USER_ID), "runs/quickstart/DONE"]
    assert built.run(container, "touch", "/kfac_dist/train.py").returncode != 0, (
        "the program is not the user's to change"
    )


@pytest.mark.long
def test_docker_stop(built: Buildah, container: str) -> None:
    """The image's stop signal to its first process: a checkpoint, exit code 75."""
    assert built.image()["StopSignal"] == "SIGUSR1"
    script = """
        "$@" train.epochs=300 schedule.end_epoch=300 &
        until [ -s runs/quickstart/metrics.jsonl ]; do sleep 0.1; done
        kill -USR1 $! && wait $!
    """
    image = built.image()
    stopped = built.run(container, "sh", "-c", script, "sh", *image["Entrypoint"], *image["Cmd"])
    assert stopped.returncode == 75, stopped.stderr
    assert "go on with --resume auto" in stopped.stdout + stopped.stderr
    assert built.run(container, "test", "-e", "runs/quickstart/DONE").returncode != 0


@pytest.mark.long
def test_the_health_check(built: Buildah, container: str) -> None:
    command = built.image()["Healthcheck"]["Test"][1:]
    healthy = built.run(container, *command)
    assert healthy.returncode == 0, healthy.stdout
    assert "training can start" in healthy.stdout
    assert built.run(container, *command, "--output", "/etc").returncode == 2


@pytest.mark.long
def test_compose_as_two_hosts(built: Buildah, tmp_path: Path) -> None:
    """The services of the file, each in a container with an address of its own."""
    reason = reason_packages_are_missing("openssh-server", "openssh-client", "iproute2", "procps") or reason_no_hosts()
    if reason:
        pytest.skip(reason)
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    entry = built.image()["Entrypoint"]
    started: dict[str, subprocess.Popen[bytes]] = {}
    with VirtualHosts(2, tmp_path / "hosts") as hosts:
        assert set(services) == set(hosts.names)
        for name, service in sorted(services.items(), reverse=True):
            inside = [*container_command(built, service, tmp_path), *entry, *shlex.split(service["command"])]
            with (tmp_path / f"{name}.log").open("w") as log:
                started[name] = subprocess.Popen(
                    hosts.command_on(name, inside), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT
                )
        code = started["node1"].wait(200)
        assert started["node2"].poll() is None, "sshd serves until it is stopped"
    started["node2"].wait(20)  # its host is gone
    said = (tmp_path / "node1.log").read_text()
    assert code == 0, said
    assert "2 ranks over MPI, 1 on this host" in said
    assert (tmp_path / "runs/compose/DONE").stat().st_uid == USER_ID
    assert (tmp_path / "ssh/id").stat().st_mode & 0o77 == 0


def container_command(built: Buildah, service: dict[str, object], folder: Path) -> list[str | os.PathLike[str]]:
    """As compose would run this service but for its command, with named volumes as folders here."""
    assert service["image"] == IMAGE.removeprefix("localhost/")
    options = ["--hostname", str(service["hostname"])]
    for name, value in service["environment"].items():
        options += ["--env", f"{name}={value}"]
    for volume in service["volumes"]:
        name, _, place = volume.partition(":")
        (folder / name).mkdir(exist_ok=True)
        os.chown(folder / name, USER_ID, USER_ID)
        options += ["--volume", f"{folder / name}:{place}"]
    return built.command("run", "--isolation", "chroot", *options, built.start(), "--")


def test_what_docker_gets_to_see(buildah: Buildah, tmp_path: Path) -> None:
    """.dockerignore: what the Dockerfile copies, and nothing else."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    buildah.do("bud", "--file", dockerfile, "--tag", "context", ".")
    container = buildah.do("from", "context")
    root = Path(buildah.do("mount", container))
    try:
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        size = sum((root / path).stat().st_size for path in files)
    finally:
        buildah.do("umount", container)
        buildah.do("rm", container)
    copied = {
        word
        for line in (ROOT / "docker/Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    tops = {str(path) if path.parts[0] == "docker" else path.parts[0] for path in files}
    assert tops == {word for word in copied if "$" not in word} | {
        "docker/requirements-cpu.lock",
        "docker/requirements-cuda.lock",
    }
    assert not [path for path in files if path.suffix == ".pyc"]
    assert size < 3e6


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_locks_hold_what_setup_asks_for(variant: str) -> None:
    """Exact versions of all of it, and no address of an index."""
    text = (ROOT / f"docker/requirements-{variant}.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in text
    locked = dict(line.split("==") for line in lock_lines(variant))
    extras = {"mpi", "dali"} if variant == "cuda" else {"mpi"}
    for text in requires("kfac_dist") or []:
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            assert wanted.specifier.contains(locked[wanted.name.lower()]), text
    assert "setuptools" in locked, "which builds the package"
    assert ("nvidia-dali-cuda130" in locked) == (variant == "cuda")
    assert ("+cpu" in locked["torch"]) == (variant == "cpu")

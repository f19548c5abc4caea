"""Python, packages, and the MPI library against mpirun. Imports neither torch nor MPI."""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kfac_dist.doctor.findings import Finding, Status

_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
# Launchers and libraries of one family understand each other.
_FAMILIES = {"Open MPI": r"Open ?MPI", "MPICH": r"MPICH|HYDRA|MVAPICH|Intel\(R\) MPI"}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that all ranks must agree in, as far as they are installed."""
    versions = {"Python": platform.python_version()}
    for name in ("kfac_dist", "torch", "torchvision", "mpi4py", "numpy", *_DALI):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def software_findings() -> list[Finding]:
    """Python and packages of this process."""
    versions = installed_versions()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    findings = [Finding("software", "ok", f"{listed} ({sys.executable})")]
    if not any(name in versions for name in _DALI):
        remedy = "scripts/setup.sh dali, to decode images on the GPU (data.loader=dali)"
        findings.append(Finding("DALI", "note", "not installed: images are decoded by threads on the CPU", remedy))
    return findings


def launcher_rank(environment: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, for when MPI cannot be asked; 0 without a launcher."""
    first = ("RANK",) if "TORCHELASTIC_RUN_ID" in environment else ()  # one torchrun a host may be under srun
    for variable in (*first, "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if environment.get(variable, "").isdigit():
            return int(environment[variable])
    return 0


def find_mpirun() -> tuple[str, str] | None:
    """Path of the mpirun that a user gets, on PATH or beside this Python, and what it says of its version."""
    path = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return path, said.stdout + said.stderr


def mpi_identity(text: str) -> tuple[str, str]:
    """Family and version out of what an MPI library or an mpirun says of itself; empty where it does not tell."""
    for family, pattern in _FAMILIES.items():
        matched = re.search(pattern, text)
        if matched:
            version = re.search(r"[0-9]+(\.[0-9]+)+", text[matched.end() :])
            return family, version[0] if version else ""
    return "", ""


def check_mpirun(library: str, mpirun: tuple[str, str] | None) -> Finding:
    """The MPI library that mpi4py loaded and the mpirun that a user gets should be one installation.

    Args:
        library: What the library says of itself.
        mpirun: See `find_mpirun`.
    """
    family, version = mpi_identity(library)
    have = f"{family} {version}" if version else library
    if mpirun is None:
        remedy = "scripts/setup.sh mpi, or put the mpirun of that library on PATH"
        return Finding("MPI", "error", f"{have}; no mpirun on PATH", remedy)
    path, said = mpirun
    other_family, other_version = mpi_identity(said)
    if not (family and other_family):
        remedy = f"compare `{path} --version` with the library by hand"
        return Finding("MPI", "note", f"{have}; {path} does not tell what it is", remedy)
    if family != other_family or (family == "Open MPI" and version != other_version):
        status: Status = "warning" if family == other_family else "error"
        found = f"mpi4py loads {have}, but {path} is {other_family} {other_version}: each rank may train alone"
        remedy = (
            f"use the mpirun of {family} {version} (scripts/mpirun.sh takes .venv's), or build mpi4py for the other: "
            f"MPICC=$(dirname {path})/mpicc pip install --force-reinstall --no-binary mpi4py mpi4py"
        )
        return Finding("MPI", status, found, remedy)
    return Finding("MPI", "ok", f"{have}; mpirun is the same version ({path})")

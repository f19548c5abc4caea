"""What a run was made with: software, machine, launch. Recorded as environment.json."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "torchvision", "numpy", "mpi4py", "kfac_dist")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_JOB_ID",
    "SLURM_NTASKS",
    "NCCL_SOCKET_IFNAME",
    "NCCL_DEBUG",
)


def describe_environment(mpi_library: str, hostnames: Sequence[str]) -> dict[str, Any]:
    """Describe the machine and software of this process, for environment.json.

    Args:
        mpi_library: The MPI library's own version string.
        hostnames: Host of each rank, in rank order.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "working_directory": os.getcwd(),
        "num_ranks": len(hostnames),
        "ranks_by_host": {host: hostnames.count(host) for host in dict.fromkeys(hostnames)},
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "mpi_library": mpi_library,
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "num_logical": os.cpu_count(),
            "num_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout at ``folder`` and whether files differ from it; None if it is no checkout."""

    def git(*arguments: str) -> str:
        # Without the lock that it takes to refresh its index: killed by a stop signal or the limit, it would leave it.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # installed into an environment that lies inside some other checkout
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None

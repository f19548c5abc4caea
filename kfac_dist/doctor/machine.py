"""Rules on a rank's GPU, NCCL and CUDA-awareness, and on the folders for output and data."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kfac_dist.communicator import devices
from kfac_dist.communicator.devices import RankDevice
from kfac_dist.doctor.findings import Finding, Status, from_error
from kfac_dist.errors import InputError

_LITTLE_SPACE = {"error": 100 << 20, "warning": 5 << 30}


def has_driver() -> bool:
    """Whether the host has NVIDIA's driver loaded, whatever torch sees of it."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def check_visible(num_gpus: int, driver: bool, torch_cuda: str | None, visible: str | None) -> Finding:
    """GPUs that torch sees, or why none; `torch_cuda` is None without CUDA in torch, `visible` CUDA_VISIBLE_DEVICES."""
    variable = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    if num_gpus:
        return Finding("GPUs", "ok", f"{num_gpus} visible{variable}")
    if not driver:
        return Finding("GPUs", "ok", "none, and no NVIDIA driver: training runs on the CPU")
    built = f"CUDA {torch_cuda}" if torch_cuda else "the CPU"
    found = f"the NVIDIA driver is there, but torch sees no GPU (torch {torch.__version__} for {built}{variable})"
    remedy = (
        "unset CUDA_VISIBLE_DEVICES; install a torch for CUDA; in a container, docker run --gpus all; nvidia-smi tells "
        "whether the driver works, and its highest CUDA version"
    )
    return Finding("GPUs", "note" if visible in ("", "-1") else "warning", found, remedy)


def try_gpu(device: torch.device) -> str:
    """Compute something on a GPU; returns what CUDA says if it cannot (no kernels for so old a GPU), else nothing."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def check_gpu(name: str, capability: tuple[int, int], failure: str) -> Finding:
    """A rank's GPU, what torch can do with it, and its `failure` in `try_gpu`."""
    precisions = ["fp32"]
    for precision in ("fp16", "bf16"):
        with contextlib.suppress(InputError):
            devices.check_capability(precision, capability, name)
            precisions.append(precision)
    found = f"{name}, compute capability {capability[0]}.{capability[1]}: {', '.join(precisions)}"
    if failure:
        remedy = "install a build of torch for this GPU (https://pytorch.org/get-started), or use another GPU"
        return Finding("GPU", "error", f"{found}; torch {torch.__version__} cannot use it: {failure}", remedy)
    if "bf16" not in precisions:
        return Finding("GPU", "note", f"{found}; no bf16", f"train.precision={' or '.join(reversed(precisions))}")
    return Finding("GPU", "ok", found)


def nccl_version() -> str | None:
    """NCCL's version, None for a build of torch without it."""
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError):  # such a build lacks the function behind it
        return None


def check_nccl(version: str | None, environment: Mapping[str, str], interfaces: Sequence[str], docker: bool) -> Finding:
    """NCCL in torch, see `nccl_version`, and which of the host's network interfaces it will use."""
    if version is None:
        remedy = "use communication.backend=mpi, or install a build of torch with NCCL"
        return Finding("NCCL", "warning", "not in this build of torch", remedy)
    chosen = environment.get("NCCL_SOCKET_IFNAME", "")
    if docker and not chosen:
        found = f"{version}; in Docker it may choose the bridge, which other hosts cannot reach, and hang"
        remedy = (
            f"docker run --network host, and NCCL_SOCKET_IFNAME=<the hosts' interface> (here: {', '.join(interfaces)})"
        )
        return Finding("NCCL", "note", found, remedy)
    return Finding("NCCL", "ok", version + (f", NCCL_SOCKET_IFNAME={chosen}" if chosen else ""))


def check_cuda_aware(aware: bool) -> Finding:
    """Whether MPI takes pointers to GPU memory; training uses that where it is so on every rank."""
    if aware:
        return Finding("CUDA-aware MPI", "ok", "yes, as MPI says when asked")
    remedy = "communication.backend=nccl, or an MPI built with CUDA (for Open MPI: --with-cuda, and UCX with CUDA)"
    return Finding("CUDA-aware MPI", "note", "no: buffers on a GPU go through host memory", remedy)


def check_gpu_per_rank(all_devices: Sequence[RankDevice]) -> list[Finding]:
    """Whether every rank has a GPU if any has, of its own, and whether GPUs are left over."""
    without = [rank for rank, device in enumerate(all_devices) if device.type == "cpu"]
    if len(without) == len(all_devices):
        return []
    try:
        devices.check_devices(all_devices, "mpi")
    except InputError as error:
        return [from_error("GPU per rank", error, without)]
    findings = []
    for uuid, ranks in devices.find_shared([device.uuid for device in all_devices]).items():
        remedy = (
            "one rank per GPU (mpirun --map-by ppr:<GPUs>:node, torchrun --nproc-per-node=<GPUs>); "
            "ranks that share one communicate over MPI, or gloo under torchrun"
        )
        found = f"{len(ranks)} ranks share GPU {uuid}: they take turns, and NCCL refuses"
        findings.append(Finding("GPU per rank", "warning", found, remedy, tuple(ranks)))
    for host in dict.fromkeys(device.host for device in all_devices):
        ranks = [rank for rank, device in enumerate(all_devices) if device.host == host]
        num_gpus = max(all_devices[rank].num_visible for rank in ranks)
        if len(ranks) < num_gpus:
            found = f"{len({all_devices[rank].uuid for rank in ranks})} of {num_gpus} GPUs of {host} used"
            remedy = f"mpirun --map-by ppr:{num_gpus}:node, torchrun --nproc-per-node={num_gpus}"
            findings.append(Finding("GPU per rank", "note", found, remedy, tuple(ranks)))
    return findings or [Finding("GPU per rank", "ok", "each rank has one of its own")]


def check_output(path: Path) -> Finding:
    """Try to write where runs will be written; the folder need not exist."""
    folder = path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kfac_dist-doctor-") as file:
            file.write(b"x")
    except OSError as error:
        remedy = "choose another folder (--output DIR, run.output_dir), or change its owner or mode (chown, chmod)"
        return Finding("output", "error", f"{path} cannot be written: {error.strerror}", remedy)
    free_bytes = shutil.disk_usage(folder).free
    found = f"{path} can be written, {free_bytes / 2**30:.1f} GiB free"
    if free_bytes >= _LITTLE_SPACE["warning"]:
        return Finding("output", "ok", found)
    status: Status = "error" if free_bytes < _LITTLE_SPACE["error"] else "warning"
    return Finding(
        "output", status, f"{found}: too little", "delete old runs, or choose another folder: run.output_dir"
    )


def check_data(path: Path) -> Finding:
    """Whether the folder of the data set can be listed and holds something."""
    found = f"{path} holds no data"
    try:
        if os.listdir(path):
            return Finding("data", "ok", f"{path} is readable")
    except OSError as error:
        found = f"{path} cannot be read: {error.strerror}"
    remedy = "name the folder that holds the data set on every host (--data DIR, data.root), mount it, or chmod -R a+rX"
    return Finding("data", "error", found, remedy)

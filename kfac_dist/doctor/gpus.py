"""Rules on GPUs, NCCL and CUDA-awareness."""

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kfac_dist import devices
from kfac_dist.doctor.findings import Finding
from kfac_dist.doctor.ranks import RankFacts, ranks_by_host
from kfac_dist.errors import InputError

_CONTEXT_BYTES = 1 << 30  # more than CUDA itself takes for one rank


@dataclass(frozen=True)
class Gpu:
    """The GPU of a rank.

    Attributes:
        index: Its number among those that the rank sees.
        name: Its model.
        capability: Compute capability, (major, minor).
        total_bytes: Its memory.
        free_bytes: The part that nobody uses.
        sharing: How many ranks of this host use it.
    """

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    sharing: int = 1


def count_gpus() -> tuple[int, str]:
    """GPUs that torch sees, and what it complained of while it looked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, " ".join(str(warning.message).strip() for warning in caught)


def read_gpu(count: int, local_rank: int, local_size: int) -> Gpu:
    """The GPU that a rank uses among the `count` that torch sees."""
    index = local_rank % count
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    sharing = len(range(index, local_size, count))
    return Gpu(index, properties.name, (properties.major, properties.minor), total, free, sharing)


def read_uuid(gpu: Gpu) -> str:
    """What tells a GPU from all others, whatever CUDA_VISIBLE_DEVICES makes of its number."""
    return devices.device_uuid(torch.device("cuda", gpu.index))


def driver_is_there() -> bool:
    """Whether the host has NVIDIA's driver loaded, whatever torch sees of it."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def nccl_version() -> str | None:
    """NCCL's version, None for a build of torch without it."""
    if torch.version.cuda is None:
        return None
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError):  # such a build lacks the function behind it
        return None


# One rank -----------------------------------------------------------------------------------------------


def check_driver(
    num_gpus: int, driver: bool, torch_cuda: str | None, environment: Mapping[str, str], complaint: str = ""
) -> Finding:
    """GPUs that torch sees, or why it sees none.

    Args:
        num_gpus: GPUs that torch sees.
        driver: Whether NVIDIA's driver is there.
        torch_cuda: CUDA version that torch was built with, None for a build without.
        environment: Usually `os.environ`.
        complaint: What torch said while it looked for GPUs.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if num_gpus:
        only = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
        return Finding("GPUs", "ok", f"{num_gpus} visible{only}")
    if not driver:
        return Finding("GPUs", "ok", "none, and no NVIDIA driver: training runs on the CPU")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        found = f"the NVIDIA driver is there, but CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        return Finding("GPUs", "note", found, "unset CUDA_VISIBLE_DEVICES, if the GPUs shall be used")
    if torch_cuda is None:
        found = f"the NVIDIA driver is there, but torch {torch.__version__} is a build for the CPU"
        remedy = "install torch and torchvision anew, as builds for CUDA"
        return Finding("GPUs", "warning", found, remedy)
    remedy = (
        f"nvidia-smi tells whether the driver works and its highest CUDA version (torch has {torch_cuda}); "
        "in a container, docker run --gpus all; unset CUDA_VISIBLE_DEVICES if it names GPUs that are not there"
    )
    found = "the NVIDIA driver is there, but torch sees no GPU" + (f": {complaint}" if complaint else "")
    return Finding("GPUs", "warning", found, remedy)


def check_gpu(gpu: Gpu, architectures: Sequence[str]) -> list[Finding]:
    """One GPU: what it is, what torch can do with it, whether others use it.

    Args:
        gpu: The rank's.
        architectures: Those that torch has kernels for, as `torch.cuda.get_arch_list()` gives them.
    """
    major, minor = gpu.capability
    precisions = precisions_of(gpu.capability)
    found = (
        f"{gpu.name}, {gpu.total_bytes / 2**30:.1f} GiB, compute capability {major}.{minor}: {', '.join(precisions)}"
    )
    if architectures and not has_kernels(gpu.capability, architectures):
        found = f"{found}; torch {torch.__version__} has no kernels for it ({', '.join(architectures)})"
        remedy = "install a build of torch for this GPU (https://pytorch.org/get-started), or use another GPU"
        return [Finding("GPU", "error", found, remedy)]
    if "bf16" not in precisions:
        remedy = f"train.precision={' or '.join(reversed(precisions))}"
        findings = [Finding("GPU", "note", f"{found}; no bf16 (compute capability 8.0 or higher)", remedy)]
    else:
        findings = [Finding("GPU", "ok", found)]
    used = gpu.total_bytes - gpu.free_bytes
    if used > gpu.sharing * _CONTEXT_BYTES:
        busy = f"{used / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB are in use by others"
        findings.append(Finding("GPU memory", "note", busy, "nvidia-smi names the processes; end them or wait"))
    else:
        findings.append(Finding("GPU memory", "ok", f"{gpu.free_bytes / 2**30:.0f} GiB free"))
    return findings


def precisions_of(capability: tuple[int, int]) -> list[str]:
    """Values of train.precision that a GPU has Tensor Cores for, and fp32."""
    names = ["fp32"]
    for precision in ("fp16", "bf16"):
        with contextlib.suppress(InputError):
            devices.check_capability(precision, capability, "")
            names.append(precision)
    return names


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build of torch runs on a GPU.

    Binaries ("sm_80") run on the same major and an equal or higher minor capability, and with a letter at their end on
    that one only; intermediate code ("compute_90") is compiled for any equal or higher one.
    """
    for architecture in architectures:
        matched = re.fullmatch(r"(sm|compute)_([0-9]+)([0-9])([a-z]?)", architecture)
        if matched is None:
            continue
        built = (int(matched[2]), int(matched[3]))
        if matched[4] == "a":
            fits = capability == built
        elif matched[1] == "sm":
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False


def check_nccl(
    version: str | None, num_gpus: int, environment: Mapping[str, str], interfaces: Sequence[str], docker: bool
) -> Finding:
    """NCCL in torch, and the network interface that it will use.

    Args:
        version: NCCL's, None where torch has none.
        num_gpus: GPUs that torch sees.
        environment: Usually `os.environ`.
        interfaces: Names of the host's network interfaces.
        docker: Whether this is a Docker container.
    """
    if not num_gpus:
        return Finding("NCCL", "ok", "not needed without GPUs")
    if version is None:
        remedy = "use communication.backend=mpi, or install a build of torch with NCCL"
        return Finding("NCCL", "warning", "not in this build of torch", remedy)
    chosen = environment.get("NCCL_SOCKET_IFNAME", "")
    names = ", ".join(interfaces)
    if chosen and not chosen.startswith("^") and not _some_match(chosen, interfaces):
        found = f"{version}; NCCL_SOCKET_IFNAME={chosen} matches no interface ({names})"
        return Finding("NCCL", "error", found, "set it to the start of one of these names, or unset it")
    if docker and not chosen:
        found = f"{version}; in Docker it may choose the bridge, which other hosts cannot reach, and hang"
        remedy = f"docker run --network host, and NCCL_SOCKET_IFNAME=<the hosts' interface> (here: {names})"
        return Finding("NCCL", "note", found, remedy)
    return Finding("NCCL", "ok", version + (f", NCCL_SOCKET_IFNAME={chosen}" if chosen else ""))


def _some_match(chosen: str, interfaces: Sequence[str]) -> bool:
    """NCCL's rule: a list of prefixes, or of whole names after "="."""
    names = chosen.removeprefix("=").split(",")
    if chosen.startswith("="):
        return any(interface in names for interface in interfaces)
    return any(interface.startswith(name) for interface in interfaces for name in names)


# All ranks ----------------------------------------------------------------------------------------------


def check_gpus_of_all(facts: Sequence[RankFacts]) -> list[Finding]:
    """Whether every rank has a GPU if any has, of its own, and whether GPUs are left over."""
    without = [rank for rank, rank_facts in enumerate(facts) if rank_facts.num_gpus == 0]
    if len(without) == len(facts):
        return []
    findings = []
    if without:
        remedy = (
            "start ranks only on hosts with GPUs (mpirun --host), do not hide GPUs from single ranks "
            "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task), or hide them from all: CUDA_VISIBLE_DEVICES="
        )
        found = f"no GPU, while {len(facts) - len(without)} of {len(facts)} ranks have one"
        findings.append(Finding("GPU per rank", "error", found, remedy, ranks=tuple(without)))
    for uuid, ranks in devices.find_shared([rank_facts.gpu for rank_facts in facts]).items():
        remedy = "one rank a GPU (mpirun --map-by ppr:<GPUs>:node); only communication.backend=mpi allows sharing"
        found = f"{len(ranks)} ranks share GPU {uuid}: they take turns, and NCCL refuses"
        findings.append(Finding("GPU per rank", "warning", found, remedy, ranks=tuple(ranks)))
    for host, ranks in ranks_by_host(facts).items():
        num_gpus = max(facts[rank].num_gpus for rank in ranks)
        used = {facts[rank].gpu for rank in ranks} - {""}
        if len(used) < num_gpus and len(ranks) < num_gpus:
            remedy = f"mpirun --map-by ppr:{num_gpus}:node"
            found = f"{len(used)} of {num_gpus} GPUs of {host} used"
            findings.append(Finding("GPU per rank", "note", found, remedy, ranks=tuple(ranks)))
    return findings or [Finding("GPU per rank", "ok", "each rank has one of its own")]


def check_cuda_aware(facts: Sequence[RankFacts]) -> list[Finding]:
    """Whether MPI takes pointers to GPU memory, which it must on all ranks or on none."""
    if not any(rank_facts.num_gpus for rank_facts in facts):
        return [Finding("CUDA-aware MPI", "ok", "not needed without GPUs")]
    unaware = [rank for rank, rank_facts in enumerate(facts) if not rank_facts.cuda_aware]
    if not unaware:
        return [Finding("CUDA-aware MPI", "ok", "yes, as MPI says when asked")]
    if len(unaware) < len(facts):
        remedy = "use one MPI installation on all hosts"
        return [Finding("CUDA-aware MPI", "warning", "not on these ranks, but on others", remedy, tuple(unaware))]
    remedy = "communication.backend=nccl, or an MPI built with CUDA (for Open MPI: --with-cuda, and UCX with CUDA)"
    return [Finding("CUDA-aware MPI", "note", "no: buffers on a GPU go through host memory", remedy)]

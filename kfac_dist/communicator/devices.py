"""Which device a rank computes on, and whether the devices of all ranks go together.

Nothing here communicates: what each rank knows of its own device (`describe_device`) travels as bytes, and the rules
are pure functions of what all ranks said.
"""

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from kfac_dist.errors import InputError
from kfac_dist.vocabulary import Backend, DeviceChoice

# Lowest compute capability whose Tensor Cores take the type.
_CAPABILITY = {"bf16": (8, 0), "fp16": (7, 0)}


@dataclass(frozen=True)
class RankDevice:
    """What one rank says of its device.

    Attributes:
        host: Host name.
        type: "cpu" or "cuda".
        uuid: Of the GPU; empty for a CPU.
        model: The GPU's name; empty for a CPU.
        num_visible: CUDA devices that the rank sees, whether it uses one or not.
    """

    host: str
    type: str
    uuid: str = ""
    model: str = ""
    num_visible: int = 0

    def to_bytes(self) -> bytes:
        """For the other ranks."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> "RankDevice":
        """What `to_bytes` of another rank made."""
        return cls(**json.loads(message))


def choose_device(wanted: DeviceChoice, local_rank: int) -> torch.device:
    """The device of a rank: one GPU for each local rank, unless the configuration says otherwise.

    The GPU becomes torch's current device. With more ranks than GPUs on a host, ranks share GPUs.

    Args:
        wanted: "auto", "cpu" or "cuda".
        local_rank: The rank's number on its own host.

    Raises:
        InputError: If a GPU is asked for and this rank sees none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    num_visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_visible == 0:
        if wanted == "cuda":
            raise InputError(
                "run.device must be cpu or auto on a machine without a CUDA device that torch sees, got cuda "
                f"(host {socket.gethostname()}; is CUDA_VISIBLE_DEVICES empty, or is this torch built without CUDA?)"
            )
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % num_visible)
    torch.cuda.set_device(device)
    return device


def current_device() -> torch.device:
    """Torch's current CUDA device where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def device_uuid(device: torch.device) -> str:
    """What tells a GPU from all others; empty for the CPU."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(uuid) if uuid else f"{socket.gethostname()}/cuda:{device.index or 0}"


def describe_device(device: torch.device) -> RankDevice:
    """What this rank has to say of its device."""
    return RankDevice(
        host=socket.gethostname(),
        type=device.type,
        uuid=device_uuid(device),
        model=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        num_visible=torch.cuda.device_count(),
    )


def find_shared(uuids_by_rank: Sequence[str]) -> dict[str, list[int]]:
    """GPUs that more than one rank uses, with those ranks.

    Args:
        uuids_by_rank: In rank order; empty for a rank on the CPU.
    """
    ranks_by_uuid: dict[str, list[int]] = {}
    for rank, uuid in enumerate(uuids_by_rank):
        if uuid:
            ranks_by_uuid.setdefault(uuid, []).append(rank)
    return {uuid: ranks for uuid, ranks in ranks_by_uuid.items() if len(ranks) > 1}


def each_has_own_gpu(devices: Sequence[RankDevice]) -> bool:
    """Whether every rank uses a GPU that no other rank uses."""
    return all(device.type == "cuda" for device in devices) and not find_shared([device.uuid for device in devices])


def check_devices(devices: Sequence[RankDevice], backend: Backend) -> list[str]:
    """Refuse devices that do not go together.

    Args:
        devices: Of every rank, in rank order.
        backend: What is to carry the buffers.

    Returns:
        What is odd but allowed, a line each, for the log.

    Raises:
        InputError: If some ranks have a GPU and others none, or if a rank has no GPU of its own and NCCL needs one.
    """
    types = _ranks_by(devices, lambda device: device.type)
    if len(types) > 1:
        using = "; ".join(f"{_use(kind, ranks)} (on {_hosts(devices, ranks)})" for kind, ranks in types.items())
        raise InputError(
            f"all ranks must compute on the same type of device, but {using}. Start ranks only where there is a GPU "
            "(is CUDA_VISIBLE_DEVICES set on those hosts, and torch built with CUDA?), or put all on the CPU with "
            "run.device=cpu"
        )
    shared = find_shared([device.uuid for device in devices])
    if backend == "nccl":
        _check_nccl(devices, shared)
    return _oddities(devices, shared)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the rank's GPU has no Tensor Cores for; the CPU takes them all.

    Raises:
        InputError: If the GPU is too old for bf16 or fp16.
    """
    if device.type == "cuda":
        check_capability(precision, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def check_capability(precision: str, capability: tuple[int, int], name: str) -> None:
    """`check_precision` for a GPU of this compute capability and name."""
    needed = _CAPABILITY.get(precision, (0, 0))
    if capability >= needed:
        return
    others = ["fp32"] + [other for other, lowest in _CAPABILITY.items() if capability >= lowest]
    raise InputError(
        f"train.precision={precision} needs a GPU of compute capability {needed[0]}.{needed[1]} or higher, but {name} "
        f"has {capability[0]}.{capability[1]}; use train.precision={' or '.join(others)}"
    )


def _check_nccl(devices: Sequence[RankDevice], shared: dict[str, list[int]]) -> None:
    if devices[0].type != "cuda":
        hosts = _hosts(devices, range(len(devices)))
        raise InputError(
            f"communication.backend=nccl needs a GPU of its own for every rank, but no rank has one (on {hosts}); "
            "use communication.backend=mpi, or auto"
        )
    if shared:
        users = "; ".join(
            f"{_ranks(ranks)} share GPU {uuid} of {devices[ranks[0]].host}" for uuid, ranks in shared.items()
        )
        raise InputError(
            f"communication.backend=nccl needs a GPU of its own for every rank, but {users}. Start fewer ranks on a "
            "host (mpirun --map-by ppr:N:node), show them more GPUs (Slurm's --gpus-per-node, "
            "CUDA_VISIBLE_DEVICES), or use communication.backend=mpi"
        )


def _oddities(devices: Sequence[RankDevice], shared: dict[str, list[int]]) -> list[str]:
    lines = []
    for uuid, ranks in shared.items():
        first = devices[ranks[0]]
        hint = f", although that host has {first.num_visible}" if first.num_visible > 1 else ""
        lines.append(f"{_ranks(ranks)} share GPU {uuid} of {first.host}{hint}")
    models = _ranks_by(devices, lambda device: device.model)
    if len(models) > 1:
        using = "; ".join(f"{_ranks(ranks)} on {model}" for model, ranks in models.items())
        lines.append(f"GPUs of different models, all ranks wait for the slowest: {using}")
    for host, ranks in _ranks_by(devices, lambda device: device.host).items():
        counts = {devices[rank].num_visible for rank in ranks}
        if len(counts) > 1:
            seen = "; ".join(f"rank {rank}: {devices[rank].num_visible}" for rank in ranks)
            lines.append(f"ranks of host {host} see different numbers of GPUs ({seen}): is each bound to its own?")
    return lines


def _ranks_by(devices: Sequence[RankDevice], key: Callable[[RankDevice], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        found.setdefault(key(device), []).append(rank)
    return found


def _use(kind: str, ranks: Sequence[int]) -> str:
    if kind != "cpu":
        return f"{_ranks(ranks)} {'use' if len(ranks) > 1 else 'uses'} {kind}"
    return f"{_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} no GPU"


def _ranks(ranks: Sequence[int]) -> str:
    """Their numbers, in words that stay short on a thousand ranks."""
    named = ", ".join(map(str, ranks[:8])) + (f", … ({len(ranks)} in all)" if len(ranks) > 8 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


def _hosts(devices: Sequence[RankDevice], ranks: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(devices[rank].host for rank in ranks))
    return ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")

"""The only place that knows MPI or NCCL."""

import logging
from typing import get_args

import torch
import torch.distributed as dist

from kfac_dist.communicator.base import Communicator, Pending
from kfac_dist.communicator.mpi import MpiCommunicator, library_version
from kfac_dist.communicator.staging import is_cuda_aware
from kfac_dist.devices import (
    RankDevice,
    check_devices,
    choose_device,
    current_device,
    describe_device,
    each_has_own_gpu,
)
from kfac_dist.errors import InputError
from kfac_dist.vocabulary import BackendChoice, ReduceScatterChoice

__all__ = [
    "Communicator",
    "MpiCommunicator",
    "Pending",
    "create_communicator",
    "is_cuda_aware",
    "library_version",
    "local_device",
]

logger = logging.getLogger(__name__)


def create_communicator(
    reduce_scatter: ReduceScatterChoice = "auto",
    backend: BackendChoice = "auto",
    device: torch.device | None = None,
) -> Communicator:
    """The communicator over all ranks of the job; a plain `python script.py` is world size 1.

    Args:
        reduce_scatter: ReduceScatterV algorithm over MPI, see `kfac_dist.communicator.mpi`; "auto" measures.
        backend: What carries the device's buffers. "auto" takes NCCL where every rank has a GPU of its own, else MPI.
        device: What this rank computes on; torch's current CUDA device, or else the CPU, if None.

    Raises:
        ValueError: If there is no such backend.
        AgreedInputError: If the ranks' devices do not go together (`kfac_dist.devices.check_devices`); on every rank.
        InputError: If NCCL could not connect this rank.
    """
    if backend not in get_args(BackendChoice):
        raise ValueError(f"backend must be one of {', '.join(get_args(BackendChoice))}, got {backend!r}")
    if device is None or (device.type == "cuda" and device.index is None):
        device = current_device()
    mpi = MpiCommunicator("reduce", device)
    devices = [RankDevice.from_bytes(message) for message in mpi.gather_bytes(describe_device(device).to_bytes())]
    has_nccl = _all_have_nccl(mpi)
    if backend == "auto":
        backend = "nccl" if has_nccl and each_has_own_gpu(devices) else "mpi"
    with mpi.raise_on_all_ranks():
        oddities = check_devices(devices, backend)
        if backend == "nccl" and not has_nccl:
            raise InputError("communication.backend=nccl needs a torch with NCCL on every host; use mpi, or auto")
    if mpi.is_main:
        for line in oddities:
            logger.warning("%s", line)
    if backend == "mpi":
        return mpi if reduce_scatter == "reduce" else MpiCommunicator(reduce_scatter, device)
    from kfac_dist.communicator.nccl import NcclCommunicator  # some builds of torch lack torch.distributed

    return NcclCommunicator(mpi, device)


def local_device() -> torch.device:
    """The device for this rank in one's own script: its own GPU, which becomes torch's current one, or else the CPU.

    Collective. GPUs are dealt out by local rank; with more ranks than GPUs on a host, ranks share.
    """
    return choose_device("auto", MpiCommunicator("reduce", torch.device("cpu")).local_rank)


def _all_have_nccl(communicator: Communicator) -> bool:
    here = dist.is_available() and dist.is_nccl_available()
    return bool(communicator.all_reduce_(torch.tensor(float(here), device="cpu"), "min"))

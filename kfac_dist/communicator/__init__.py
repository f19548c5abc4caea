"""The only room that knows MPI or torch.distributed. Importing it starts neither."""

from importlib import import_module
from typing import TYPE_CHECKING

from kfac_dist.communicator.base import Communicator as Communicator
from kfac_dist.communicator.base import Pending as Pending
from kfac_dist.communicator.create import create_communicator as create_communicator
from kfac_dist.communicator.create import local_device as local_device
from kfac_dist.communicator.launcher_variables import library_version as library_version
from kfac_dist.communicator.staging import is_cuda_aware as is_cuda_aware

if TYPE_CHECKING:
    from kfac_dist.communicator.mpi import MpiCommunicator as MpiCommunicator


def __getattr__(name: str) -> object:
    if name != "MpiCommunicator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("kfac_dist.communicator.mpi").MpiCommunicator  # starts MPI

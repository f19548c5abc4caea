"""The only room that knows MPI or torch.distributed."""

from kfac_dist.communicator.base import Communicator as Communicator
from kfac_dist.communicator.base import Pending as Pending
from kfac_dist.communicator.create import create_communicator as create_communicator
from kfac_dist.communicator.create import local_device as local_device
from kfac_dist.communicator.mpi import MpiCommunicator as MpiCommunicator
from kfac_dist.communicator.mpi import library_version as library_version
from kfac_dist.communicator.staging import is_cuda_aware as is_cuda_aware

"""The only place that knows MPI or NCCL."""

from typing import Literal

from kfac_dist.communicator.base import Communicator
from kfac_dist.communicator.mpi import MpiCommunicator, ReduceScatterAlgorithm, library_version

__all__ = ["Communicator", "MpiCommunicator", "create_communicator", "library_version"]


def create_communicator(reduce_scatter: ReduceScatterAlgorithm | Literal["auto"] = "auto") -> Communicator:
    """The communicator over all ranks of the job; a plain `python script.py` is world size 1.

    Args:
        reduce_scatter: ReduceScatterV algorithm, see `kfac_dist.communicator.mpi`; "auto" measures.
    """
    return MpiCommunicator(reduce_scatter)

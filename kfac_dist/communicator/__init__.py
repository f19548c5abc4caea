"""The only place that knows MPI or NCCL."""

from typing import Literal, get_args

from kfac_dist.communicator.base import Communicator
from kfac_dist.communicator.mpi import MpiCommunicator, ReduceScatterAlgorithm, library_version

__all__ = ["Communicator", "MpiCommunicator", "create_communicator", "library_version"]

Backend = Literal["auto", "mpi"]


def create_communicator(
    reduce_scatter: ReduceScatterAlgorithm | Literal["auto"] = "auto", backend: Backend = "auto"
) -> Communicator:
    """The communicator over all ranks of the job; a plain `python script.py` is world size 1.

    Args:
        reduce_scatter: ReduceScatterV algorithm, see `kfac_dist.communicator.mpi`; "auto" measures.
        backend: What carries the buffers; MPI is all there is, and what "auto" takes.

    Raises:
        ValueError: If there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return MpiCommunicator(reduce_scatter)

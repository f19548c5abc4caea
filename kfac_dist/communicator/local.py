"""The communicator of a job of one process, which needs no library for it."""

from collections.abc import Sequence

from torch import Tensor

from kfac_dist.communicator.base import Communicator, Completion, ReduceOp, already_complete


class LocalCommunicator(Communicator):
    """Collectives of one rank with itself: a buffer is its own sum, and every segment is its own."""

    rank = local_rank = 0
    size = local_size = 1

    @property
    def description(self) -> str:
        return "1 rank, without MPI"

    def _start_reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        return already_complete

    def _start_all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        return already_complete

    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        received.copy_(sent)
        return already_complete

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        return tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        return tensor

    def barrier(self) -> None:
        """Nobody is waited for."""

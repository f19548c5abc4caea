"""The communicator over MPI (mpi4py), without pickling.

A CPU tensor is handed to MPI as it is, and so is a CUDA tensor where the library is CUDA-aware on every host; else a
CUDA tensor is staged through pinned host memory. Every collective is complete when it has been started.

ReduceScatterV has three algorithms, chosen by a short measurement at start-up because the best one
depends on the MPI library and the network (on one host Open MPI's native call is the slowest):

    native    MPI_Reduce_scatter
    reduce    one MPI_Reduce to each owner, in turn
    ireduce   the same reductions, all in flight at once; reduce instead for device buffers, which Open MPI's
              non-blocking reductions do not take

MPI before version 4 counts values in 32 bits. What is longer goes in pieces, by calls that take no offset: one
broadcast from each owner for AllGatherV, the reductions for ReduceScatterV, messages for the exchange of encoded
segments. That needs no MPI 4, and is the same on every rank, for all know all counts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from kfac_dist.communicator.base import (
    Communicator,
    Completion,
    ReduceOp,
    already_complete,
    own_segment,
    ranks_in_words,
)
from kfac_dist.communicator.fastest import Algorithm, measure_algorithms
from kfac_dist.communicator.staging import NOTHING, WHOLE, Staging, is_cuda_aware
from kfac_dist.vocabulary import ReduceScatterAlgorithm, ReduceScatterChoice

_OPERATIONS = {"sum": MPI.SUM, "mean": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
_MAX_COUNT = 2**31 - 1


class MpiCommunicator(Communicator):
    """Collectives of `MPI.COMM_WORLD`, on a duplicate of it so that a host program's messages never mix."""

    def __init__(
        self,
        reduce_scatter: ReduceScatterChoice = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Set up; collective.

        Args:
            reduce_scatter: The ReduceScatterV algorithm; "auto" measures, for a second at most and the call that is
                then under way.
            device: Where the buffers will be, for the description; the CPU if None.

        Raises:
            AgreedInputError: If KFAC_DIST_CUDA_AWARE_MPI is neither 0 nor 1.
        """
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        # Open MPI's own local rank disagrees with the shared-memory split under --map-by numa.
        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        local.Free()
        self._device = device or torch.device("cpu")
        self._staging = Staging()
        self._is_cuda_aware = self._all_are_cuda_aware()
        self.reduce_scatter_seconds: dict[str, float] = {}
        self.reduce_scatter_algorithm: ReduceScatterAlgorithm = "reduce"
        if reduce_scatter != "auto":
            self.reduce_scatter_algorithm = reduce_scatter
        elif self.size > 1:
            self.reduce_scatter_seconds = measure_algorithms(self, dict(self._algorithms().items()))
            if self.reduce_scatter_seconds:
                self.reduce_scatter_algorithm = min(self._algorithms(), key=self._measured)

    @property
    def description(self) -> str:
        timings = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.reduce_scatter_seconds.items())
        choice = f"ReduceScatterV by {self.reduce_scatter_algorithm}" + (f" (measured: {timings})" if timings else "")
        way = ""
        if self._device.type == "cuda":
            way = "CUDA-aware" if self._is_cuda_aware else "CUDA buffers through pinned host memory"
        return f"{ranks_in_words(self.size)} over MPI{way and f' ({way})'}, {self.local_size} on this host; {choice}"

    # Collectives --------------------------------------------------------------------------------------

    def _start_reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        if self.size > 1:
            own = own_segment(self.rank, counts)
            algorithm = self._algorithms()[self._algorithm_for(buffer)]
            with self._for_mpi(buffer, store=own) as shared:
                segment = algorithm(shared, counts)
                if segment.data_ptr() != shared[own].data_ptr():
                    shared[own] = segment
        return already_complete

    def _start_all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        if self.size > 1:
            with self._for_mpi(buffer, fetch=own_segment(self.rank, counts)) as shared:
                if shared.dtype.is_floating_point and shared.element_size() == 2:
                    shared = shared.view(torch.int16)  # MPI has no name for half precision
                if shared.numel() <= _MAX_COUNT:
                    self._comm.Allgatherv(MPI.IN_PLACE, [_mpi_buffer(shared), (list(counts), None)])
                else:
                    for owner, segment in enumerate(shared.split(list(counts))):
                        self._broadcast_pieces(segment, owner)
        return already_complete

    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        if self.size == 1:
            received.copy_(sent)
            return already_complete
        arriving = [sizes[self.rank]] * self.size
        with self._for_mpi(sent, store=NOTHING) as outgoing, self._for_mpi(received, fetch=NOTHING) as incoming:
            if max(sum(sizes), self.size * max(sizes)) <= _MAX_COUNT:
                self._comm.Alltoallv(
                    [_mpi_buffer(outgoing), (list(sizes), None)], [_mpi_buffer(incoming), (arriving, None)]
                )
            else:
                self._exchange_pieces(outgoing.split(list(sizes)), incoming.split(arriving))
        return already_complete

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self.size > 1:
            with self._for_mpi(tensor) as shared:
                for piece in _pieces(shared.view(-1)):
                    self._comm.Allreduce(MPI.IN_PLACE, _mpi_buffer(piece), op=_OPERATIONS[op])
        return tensor.div_(self.size) if op == "mean" else tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        # Weights come in any layout (channels-last) and in types that MPI has no name for (bfloat16): send bytes,
        # through the host, since this happens at the start only.
        host = tensor.detach().cpu().contiguous()
        self._broadcast_pieces(host.view(-1).view(torch.uint8), root)
        return tensor.copy_(host)

    def barrier(self) -> None:
        self._comm.Barrier()

    # Buffers of more values than MPI counts -----------------------------------------------------------

    def _broadcast_pieces(self, flat: Tensor, root: int) -> None:
        for piece in _pieces(flat):
            self._comm.Bcast(_mpi_buffer(piece), root=root)

    def _exchange_pieces(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Send each rank its segment, and receive from each."""
        requests = [
            self._comm.Irecv(_mpi_buffer(piece), source=other)
            for other, segment in enumerate(incoming)
            for piece in _pieces(segment)
        ]
        requests += [
            self._comm.Isend(_mpi_buffer(piece), dest=other)
            for other, segment in enumerate(outgoing)
            for piece in _pieces(segment)
        ]
        MPI.Request.Waitall(requests)

    # Device buffers -----------------------------------------------------------------------------------

    @contextmanager
    def _for_mpi(self, tensor: Tensor, fetch: slice = WHOLE, store: slice = WHOLE) -> Iterator[Tensor]:
        """What to hand to MPI for a tensor.

        Args:
            tensor: Contiguous.
            fetch: Which of its values MPI will read.
            store: Which of them MPI will write.
        """
        assert tensor.is_contiguous()
        if not tensor.is_cuda:
            yield tensor.detach()
        elif self._is_cuda_aware:
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows nothing of streams
            yield tensor.detach()
        else:
            with self._staging.staged(tensor, fetch, store) as host:
                yield host

    def _all_are_cuda_aware(self) -> bool:
        """The same on every rank, as the choice of algorithm depends on it."""
        with self.raise_on_all_ranks():
            here = is_cuda_aware()
        everywhere = np.array([here], dtype=np.int32)
        self._comm.Allreduce(MPI.IN_PLACE, everywhere, op=MPI.MIN)
        return bool(everywhere[0])

    # ReduceScatterV -----------------------------------------------------------------------------------

    def _algorithms(self) -> dict[ReduceScatterAlgorithm, Algorithm]:
        return {"native": self._native, "reduce": self._reduce, "ireduce": self._ireduce}

    def _measured(self, algorithm: ReduceScatterAlgorithm) -> float:
        return self.reduce_scatter_seconds.get(algorithm, float("inf"))

    def _algorithm_for(self, buffer: Tensor) -> ReduceScatterAlgorithm:
        if self.reduce_scatter_algorithm == "ireduce" and buffer.is_cuda and self._is_cuda_aware:
            return "reduce"
        if self.reduce_scatter_algorithm == "native" and buffer.numel() > _MAX_COUNT:
            return "reduce"
        return self.reduce_scatter_algorithm

    def _native(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segment = shared.new_empty(counts[self.rank])
        self._comm.Reduce_scatter(_mpi_buffer(shared), _mpi_buffer(segment), recvcounts=list(counts))
        return segment

    def _reduce(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(shared, list(counts))
        for owner, segment in enumerate(segments):
            for piece in _pieces(segment):
                self._comm.Reduce(*self._reduce_buffers(piece, owner), root=owner)
        return segments[self.rank]

    def _ireduce(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(shared, list(counts))
        MPI.Request.Waitall(
            [
                self._comm.Ireduce(*self._reduce_buffers(piece, owner), root=owner)
                for owner, segment in enumerate(segments)
                for piece in _pieces(segment)
            ]
        )
        return segments[self.rank]

    def _reduce_buffers(self, piece: Tensor, owner: int) -> tuple[Any, Any]:
        """Send and receive buffers of a reduction that ends in the owner's own segment."""
        buffer = _mpi_buffer(piece)
        return (MPI.IN_PLACE, buffer) if owner == self.rank else (buffer, None)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """Cut (numel,) into views that MPI can count; none of an empty tensor."""
    return iter(flat.split(_MAX_COUNT) if flat.numel() else ())


def _mpi_buffer(tensor: Tensor) -> Any:
    """What mpi4py takes: numpy's view of host memory; a device tensor as it is, by the DLPack protocol."""
    return tensor if tensor.is_cuda else tensor.numpy()

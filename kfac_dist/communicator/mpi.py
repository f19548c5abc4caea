"""The communicator over MPI (mpi4py), without pickling.

A CPU tensor is handed to MPI as it is, and so is a CUDA tensor where the library is CUDA-aware on every host; else a
CUDA tensor is staged through pinned host memory. Every collective is complete when it has been started.

ReduceScatterV has three algorithms, chosen by a short measurement at start-up because the best one
depends on the MPI library and the network (on one host Open MPI's native call is the slowest):

    native    MPI_Reduce_scatter
    reduce    one MPI_Reduce to each owner, in turn
    ireduce   the same reductions, all in flight at once; reduce instead for device buffers, which Open MPI's
              non-blocking reductions do not take
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from kfac_dist.communicator.base import Communicator, Completion, ReduceOp, already_complete, own_segment
from kfac_dist.communicator.staging import NOTHING, WHOLE, Staging
from kfac_dist.communicator.staging import is_cuda_aware as is_cuda_aware
from kfac_dist.vocabulary import ReduceScatterAlgorithm, ReduceScatterChoice

logger = logging.getLogger(__name__)

_OPERATIONS = {"sum": MPI.SUM, "mean": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
_MEASURED_BYTES = 8 << 20
_MEASURED_REPEATS = 3


class MpiCommunicator(Communicator):
    """Collectives of `MPI.COMM_WORLD`, on a duplicate of it so that a host program's messages never mix."""

    def __init__(
        self,
        reduce_scatter: ReduceScatterChoice = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Set up; collective.

        Args:
            reduce_scatter: The ReduceScatterV algorithm; "auto" measures all three.
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
        self._is_cuda_aware = self._all_are_cuda_aware()
        self._staging = Staging()
        self.reduce_scatter_seconds: dict[str, float] = {}
        if reduce_scatter == "auto":
            reduce_scatter = self._fastest_reduce_scatter()
        self.reduce_scatter_algorithm: ReduceScatterAlgorithm = reduce_scatter

    @property
    def description(self) -> str:
        timings = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.reduce_scatter_seconds.items())
        choice = f"ReduceScatterV by {self.reduce_scatter_algorithm}" + (f" (measured: {timings})" if timings else "")
        way = ""
        if self._device.type == "cuda":
            way = "CUDA-aware" if self._is_cuda_aware else "CUDA buffers through pinned host memory"
        return f"{self.size} ranks over MPI{way and f' ({way})'}, {self.local_size} on this host; {choice}"

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
                self._comm.Allgatherv(MPI.IN_PLACE, [_mpi_buffer(shared), (list(counts), None)])
        return already_complete

    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        if self.size == 1:
            received.copy_(sent)
            return already_complete
        arriving = [sizes[self.rank]] * self.size
        with self._for_mpi(sent, store=NOTHING) as outgoing, self._for_mpi(received, fetch=NOTHING) as incoming:
            self._comm.Alltoallv(
                [_mpi_buffer(outgoing), (list(sizes), None)], [_mpi_buffer(incoming), (arriving, None)]
            )
        return already_complete

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        if self.size > 1:
            with self._for_mpi(tensor) as shared:
                self._comm.Allreduce(MPI.IN_PLACE, _mpi_buffer(shared), op=_OPERATIONS[op])
        return tensor.div_(self.size) if op == "mean" else tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        # Weights come in any layout (channels-last) and in types that MPI has no name for (bfloat16): send bytes,
        # through the host, since this happens at the start only.
        host = tensor.detach().cpu().contiguous()
        self._comm.Bcast(host.view(-1).view(torch.uint8).numpy(), root=root)
        return tensor.copy_(host)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        lengths = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([len(message)], dtype=np.int64), lengths)
        gathered = np.empty(int(lengths.sum()), dtype=np.uint8)
        self._comm.Allgatherv(np.frombuffer(message, dtype=np.uint8), [gathered, (lengths.tolist(), None)])
        pieces = np.split(gathered, np.cumsum(lengths)[:-1])
        return [piece.tobytes() for piece in pieces]

    def barrier(self) -> None:
        self._comm.Barrier()

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

    def _algorithms(self) -> dict[ReduceScatterAlgorithm, Callable[[Tensor, Sequence[int]], Tensor]]:
        return {"native": self._native, "reduce": self._reduce, "ireduce": self._ireduce}

    def _algorithm_for(self, buffer: Tensor) -> ReduceScatterAlgorithm:
        if self.reduce_scatter_algorithm == "ireduce" and buffer.is_cuda and self._is_cuda_aware:
            return "reduce"
        return self.reduce_scatter_algorithm

    def _native(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segment = shared.new_empty(counts[self.rank])
        self._comm.Reduce_scatter(_mpi_buffer(shared), _mpi_buffer(segment), recvcounts=list(counts))
        return segment

    def _reduce(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(shared, list(counts))
        for owner, segment in enumerate(segments):
            if counts[owner]:
                self._comm.Reduce(*self._reduce_buffers(segment, owner), root=owner)
        return segments[self.rank]

    def _ireduce(self, shared: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(shared, list(counts))
        MPI.Request.Waitall(
            [
                self._comm.Ireduce(*self._reduce_buffers(segment, owner), root=owner)
                for owner, segment in enumerate(segments)
                if counts[owner]
            ]
        )
        return segments[self.rank]

    def _reduce_buffers(self, segment: Tensor, owner: int) -> tuple[Any, Any]:
        """Send and receive buffers of a reduction that ends in the owner's own segment."""
        buffer = _mpi_buffer(segment)
        return (MPI.IN_PLACE, buffer) if owner == self.rank else (buffer, None)

    def _fastest_reduce_scatter(self) -> ReduceScatterAlgorithm:
        """Time the algorithms on a buffer of a few MiB; rank 0's figures decide for all."""
        algorithms = self._algorithms()
        if self.size == 1:
            return "reduce"
        count = _MEASURED_BYTES // 4 // self.size
        counts = [count] * self.size
        host = torch.zeros(count * self.size, device="cpu")
        seconds = torch.zeros(len(algorithms), dtype=torch.float64, device="cpu")
        for number, algorithm in enumerate(algorithms.values()):
            times = []
            for _ in range(1 + _MEASURED_REPEATS):
                self.barrier()
                start = time.perf_counter()
                algorithm(host, counts)
                self.barrier()
                times.append(time.perf_counter() - start)
            seconds[number] = min(times[1:])  # the first call sets up connections
        self.broadcast_(seconds)
        self.reduce_scatter_seconds = dict(zip(algorithms, seconds.tolist(), strict=True))
        return get_args(ReduceScatterAlgorithm)[int(seconds.argmin())]  # type: ignore[no-any-return]


def library_version() -> str:
    """First line of what the MPI library says of itself, and the mpi4py version."""
    import mpi4py

    return f"{MPI.Get_library_version().splitlines()[0].strip(chr(0))} (mpi4py {mpi4py.__version__})"


def _mpi_buffer(tensor: Tensor) -> Any:
    """What mpi4py takes: numpy's view of host memory; a device tensor as it is, by the DLPack protocol."""
    return tensor if tensor.is_cuda else tensor.numpy()

"""The communicator over MPI (mpi4py), on host buffers, without pickling.

A CPU tensor is handed to MPI as it is; a CUDA tensor is staged through the host.

ReduceScatterV has three algorithms, chosen by a short measurement at start-up because the best one
depends on the MPI library and the network (on one host Open MPI's native call is the slowest):

    native    MPI_Reduce_scatter
    reduce    one MPI_Reduce to each owner, in turn
    ireduce   the same reductions, all in flight at once
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from kfac_dist.communicator.base import Communicator, ReduceOp

logger = logging.getLogger(__name__)

ReduceScatterAlgorithm = Literal["native", "reduce", "ireduce"]

_OPERATIONS = {"sum": MPI.SUM, "mean": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
_MEASURED_BYTES = 8 << 20
_MEASURED_REPEATS = 3


class MpiCommunicator(Communicator):
    """Collectives of `MPI.COMM_WORLD`, on a duplicate of it so that a host program's messages never mix."""

    def __init__(self, reduce_scatter: ReduceScatterAlgorithm | Literal["auto"] = "auto") -> None:
        """Set up; collective.

        Args:
            reduce_scatter: The ReduceScatterV algorithm; "auto" measures all three.
        """
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        # Open MPI's own local rank disagrees with the shared-memory split under --map-by numa.
        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        local.Free()
        self.reduce_scatter_seconds: dict[str, float] = {}
        if reduce_scatter == "auto":
            reduce_scatter = self._fastest_reduce_scatter()
        self.reduce_scatter_algorithm: ReduceScatterAlgorithm = reduce_scatter

    @property
    def description(self) -> str:
        timings = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in self.reduce_scatter_seconds.items())
        choice = f"ReduceScatterV by {self.reduce_scatter_algorithm}" + (f" (measured: {timings})" if timings else "")
        return f"{self.size} ranks over MPI, {self.local_size} on this host; {choice}"

    # Collectives --------------------------------------------------------------------------------------

    def reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Tensor:
        self.payload_bytes += buffer.numel() * buffer.element_size()
        begin = sum(counts[: self.rank])
        own = buffer[begin : begin + counts[self.rank]]
        if self.size == 1:
            return own
        host = _to_host(buffer)
        own.copy_(self._algorithms()[self.reduce_scatter_algorithm](host, counts))
        return own.div_(self.size)

    def all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> None:
        self.payload_bytes += buffer.numel() * buffer.element_size()
        if self.size == 1:
            return
        host = _to_host(buffer)
        self._comm.Allgatherv(MPI.IN_PLACE, [host.numpy(), (list(counts), None)])
        _to_device(host, buffer)

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        host = _to_host(tensor)
        self._comm.Allreduce(MPI.IN_PLACE, host.numpy(), op=_OPERATIONS[op])
        _to_device(host, tensor)
        return tensor.div_(self.size) if op == "mean" else tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        # Weights come in any layout (channels-last) and in types that MPI has no name for (bfloat16): send bytes.
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

    # ReduceScatterV -----------------------------------------------------------------------------------

    def _algorithms(self) -> dict[ReduceScatterAlgorithm, Callable[[Tensor, Sequence[int]], Tensor]]:
        return {"native": self._native, "reduce": self._reduce, "ireduce": self._ireduce}

    def _native(self, host: Tensor, counts: Sequence[int]) -> Tensor:
        segment = torch.empty(counts[self.rank], dtype=host.dtype)
        self._comm.Reduce_scatter(host.numpy(), segment.numpy(), recvcounts=list(counts))
        return segment

    def _reduce(self, host: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(host, list(counts))
        for owner, segment in enumerate(segments):
            if counts[owner]:
                self._comm.Reduce(*self._reduce_buffers(segment, owner), root=owner)
        return segments[self.rank]

    def _ireduce(self, host: Tensor, counts: Sequence[int]) -> Tensor:
        segments = torch.split(host, list(counts))
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
        return (MPI.IN_PLACE, segment.numpy()) if owner == self.rank else (segment.numpy(), None)

    def _fastest_reduce_scatter(self) -> ReduceScatterAlgorithm:
        """Time the algorithms on a buffer of a few MiB; rank 0's figures decide for all."""
        algorithms = self._algorithms()
        if self.size == 1:
            return "reduce"
        count = _MEASURED_BYTES // 4 // self.size
        counts = [count] * self.size
        host = torch.zeros(count * self.size)
        seconds = torch.zeros(len(algorithms), dtype=torch.float64)
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


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor itself on the CPU, else a host copy."""
    assert tensor.is_contiguous()
    return tensor.detach().cpu()


def _to_device(host: Tensor, tensor: Tensor) -> Tensor:
    """Bring a staged result back; nothing to do for a CPU tensor, which was changed in place."""
    return tensor if tensor.device.type == "cpu" else tensor.copy_(host)

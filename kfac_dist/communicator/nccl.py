"""The communicator over NCCL (torch.distributed), for ranks with a GPU each.

CUDA tensors go through NCCL on its own stream, beside the computation: starting a collective does not hold up the
host, and waiting for it holds up the current stream only. CPU tensors, messages and the barrier go over MPI.

Segments of one length take NCCL's own ReduceScatter and AllGather. NCCL has none for uneven segments: those are one
Reduce to, or one Broadcast from, each owner, in one group, so that NCCL runs them as one operation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from kfac_dist.communicator.base import Communicator, Completion, ReduceOp, own_segment
from kfac_dist.communicator.mpi import MpiCommunicator
from kfac_dist.communicator.process_group import DEFAULT_TIMEOUT, open_group

# Under their names since torch 2.13, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class NcclCommunicator(Communicator):
    """Collectives of a torch.distributed process group over the ranks of an `MpiCommunicator`."""

    def __init__(
        self,
        parent: MpiCommunicator,
        device: torch.device,
        backend: Literal["nccl", "gloo"] = "nccl",
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        """Connect the ranks; collective.

        Args:
            parent: Carries what is not on the device.
            device: This rank's own GPU; no other rank may use it.
            backend: torch.distributed's; "gloo", with the CPU as device, is for tests.
            timeout: For connecting, and for each collective later; torch ends the process when it has passed.

        Raises:
            InputError: If the ranks cannot be connected.
        """
        self.rank, self.size = parent.rank, parent.size
        self.local_rank, self.local_size = parent.local_rank, parent.local_size
        self._parent = parent
        self._device = device
        self._backend = backend
        self._group = open_group(parent, backend, device, timeout)

    @property
    def description(self) -> str:
        version = ""
        if self._backend == "nccl":
            version = " " + ".".join(str(part) for part in torch.cuda.nccl.version())
        return f"{self.size} ranks over {self._backend.upper()}{version}, {self.local_size} on this host"

    # Collectives --------------------------------------------------------------------------------------

    def _start_reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        if not self._is_ours(buffer):
            return self._parent._start_reduce_scatter_v(buffer, counts)
        if not _are_equal(counts):
            return self._start_with_each_owner(dist.reduce, buffer, counts)
        own = buffer[own_segment(self.rank, counts)]
        return _finish_of(_reduce_scatter(own, buffer, group=self._group, async_op=True))

    def _start_all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        if not self._is_ours(buffer):
            return self._parent._start_all_gather_v(buffer, counts)
        if not _are_equal(counts):
            return self._start_with_each_owner(dist.broadcast, buffer, counts)
        own = buffer[own_segment(self.rank, counts)]
        return _finish_of(_all_gather(buffer, own, group=self._group, async_op=True))

    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        if not self._is_ours(sent):
            return self._parent._start_all_to_all_v(sent, received, sizes)
        arriving = [sizes[self.rank]] * self.size
        return _finish_of(
            dist.all_to_all_single(received, sent, arriving, list(sizes), group=self._group, async_op=True)
        )

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        if not self._is_ours(tensor):
            return self._parent.all_reduce_(tensor, op)
        assert tensor.is_contiguous()
        dist.all_reduce(tensor.detach(), op=_OPERATIONS[op], group=self._group)
        return tensor.div_(self.size) if op == "mean" else tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        if not self._is_ours(tensor):
            return self._parent.broadcast_(tensor, root)
        # Bytes, for any layout (channels-last) and any type (bool).
        dense = tensor.detach().contiguous()
        dist.broadcast(dense.view(-1).view(torch.uint8), root, group=self._group)
        return tensor.copy_(dense)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        return self._parent.gather_bytes(message)

    def barrier(self) -> None:
        self._parent.barrier()

    # torch.distributed --------------------------------------------------------------------------------

    def _is_ours(self, tensor: Tensor) -> bool:
        """Whether the process group takes the tensor; else MPI does."""
        return tensor.device.type == self._device.type

    def _start_with_each_owner(
        self, collective: Callable[..., dist.Work | None], buffer: Tensor, counts: Sequence[int]
    ) -> Completion:
        """Reduce every segment to its owner, or broadcast it from there."""
        works: list[dist.Work | None] = []
        with self._as_one_operation(works):
            for owner, segment in enumerate(buffer.split(list(counts))):
                if counts[owner]:
                    works.append(collective(segment, owner, group=self._group, async_op=True))
        return _finish_of(*works)

    @contextmanager
    def _as_one_operation(self, works: list[dist.Work | None]) -> Iterator[None]:
        """Group what is started inside, whose works are replaced by the group's. Gloo, in tests, cannot."""
        if self._backend != "nccl":
            yield
            return
        with _coalescing_manager(self._group, self._device, async_ops=True) as manager:
            yield
        works[:] = manager.works


def _are_equal(counts: Sequence[int]) -> bool:
    return len(set(counts)) == 1


def _finish_of(*works: dist.Work | None) -> Completion:
    def finish() -> None:
        for work in works:
            if work is not None:
                work.wait()

    return finish

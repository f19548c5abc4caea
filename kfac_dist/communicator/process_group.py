"""The communicator over torch.distributed: NCCL for ranks with a GPU each, gloo for CPU tensors; it needs no MPI.

CUDA tensors go through NCCL on its own stream, beside the computation: starting a collective does not hold up the
host, and waiting for it holds up the current stream only. CPU tensors, messages and the barrier go over a host
communicator, which is MPI's or another of this class, over gloo.

NCCL has AllGather and ReduceScatter for segments of one length only. Uneven ones are given to `all_gather` and
`reduce_scatter` as lists of tensors: then torch calls one ncclBroadcast from, or one ncclReduce to, each owner between
ncclGroupStart and ncclGroupEnd, so that NCCL sees one operation. That is so in torch's older NCCL backend and in the
new one that the name `nccl` stands for since torch 2.15 (`nccl2`, src/…/c10d/nccl2/ProcessGroupNCCL.cpp), whose
startCoalescing groups sends and receives only: `_coalescing_manager` would launch every collective by itself there.
An emulated NCCL (tests/emulated_gpu) sees the one group; over NCCL itself the lists have not run yet.

Gloo refuses lists of uneven tensors and makes a reduce_scatter of whole all-reduces, so over any backend but NCCL each
owner's segment is a reduce, or a broadcast, of its own, all in flight at once.
"""

import socket
from collections.abc import Callable, Sequence
from os import environ

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_dist.communicator.base import (
    Communicator,
    Completion,
    ReduceOp,
    already_complete,
    own_segment,
    ranks_in_words,
)
from kfac_dist.communicator.launcher_variables import launched_by_torchrun
from kfac_dist.communicator.staging import NOTHING, WHOLE, Staging

# Under their names since torch 2.13, and before.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class ProcessGroupCommunicator(Communicator):
    """Collectives of a connected torch.distributed process group over all ranks of the job."""

    in_background = True  # NCCL on a stream of its own, gloo in threads

    def __init__(
        self, group: dist.ProcessGroup, backend: str, device: torch.device, host: Communicator | None = None
    ) -> None:
        """Set up; collective.

        Args:
            group: The process group.
            backend: torch.distributed's name of what the group uses on the device.
            device: The CPU, or this rank's own GPU: tensors there go through the group.
            host: Carries CPU tensors and messages where the device is a GPU. None where it is the CPU; then CUDA
                tensors go through pinned host memory.
        """
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._backend = backend
        self._device = device
        self._host = host
        self._staging = Staging()
        if host is not None:
            self.local_rank, self.local_size = host.local_rank, host.local_size
        else:
            self.local_rank, self.local_size = self._find_local_rank()

    def let_go(self) -> None:
        """Give up the process group, so that it ends with its threads; no collective can follow."""
        del self._group

    @property
    def description(self) -> str:
        version = ""
        if self._is_nccl:
            version = " " + ".".join(str(part) for part in torch.cuda.nccl.version())
        return f"{ranks_in_words(self.size)} over {self._backend.upper()}{version}, {self.local_size} on this host"

    # Collectives --------------------------------------------------------------------------------------

    def _start_reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        own = own_segment(self.rank, counts)
        if not self._is_ours(buffer):
            if self._host is not None:
                return self._host._start_reduce_scatter_v(buffer, counts)
            with self._staging.staged(buffer, fetch=WHOLE, store=own) as staged:
                self._start_reduce_scatter_v(staged, counts)()
            return already_complete
        if not self._is_nccl:
            return self._start_with_each_owner(dist.reduce, buffer, counts)
        if _are_equal(counts):
            return _finish_of(_reduce_scatter_single(buffer[own], buffer, group=self._group, async_op=True))
        segments = _none_empty(buffer, counts)
        return _finish_of(dist.reduce_scatter(segments[self.rank], segments, group=self._group, async_op=True))

    def _start_all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        own = own_segment(self.rank, counts)
        if not self._is_ours(buffer):
            if self._host is not None:
                return self._host._start_all_gather_v(buffer, counts)
            with self._staging.staged(buffer, fetch=own, store=WHOLE) as staged:
                self._start_all_gather_v(staged, counts)()
            return already_complete
        if _are_equal(counts):
            return _finish_of(_all_gather_single(buffer, buffer[own], group=self._group, async_op=True))
        if not self._is_nccl:
            return self._start_with_each_owner(dist.broadcast, buffer, counts)
        segments = _none_empty(buffer, counts)
        return _finish_of(dist.all_gather(segments, segments[self.rank], group=self._group, async_op=True))

    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        if not self._is_ours(sent):
            if self._host is not None:
                return self._host._start_all_to_all_v(sent, received, sizes)
            with (
                self._staging.staged(sent, fetch=WHOLE, store=NOTHING) as outgoing,
                self._staging.staged(received, fetch=NOTHING, store=WHOLE) as incoming,
            ):
                self._start_all_to_all_v(outgoing, incoming, sizes)()
            return already_complete
        arriving = [sizes[self.rank]] * self.size
        return _finish_of(
            dist.all_to_all_single(received, sent, arriving, list(sizes), group=self._group, async_op=True)
        )

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        if not self._is_ours(tensor):
            if self._host is not None:
                return self._host.all_reduce_(tensor, op)
            with self._staging.staged(tensor, fetch=WHOLE, store=WHOLE) as staged:
                self.all_reduce_(staged, op)
            return tensor
        assert tensor.is_contiguous()
        dist.all_reduce(tensor.detach(), op=_OPERATIONS[op], group=self._group)
        return tensor.div_(self.size) if op == "mean" else tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        if self._host is not None and not self._is_ours(tensor):
            return self._host.broadcast_(tensor, root)
        # Bytes, for any layout (channels-last) and any type (bool).
        dense = tensor.detach().to(self._device).contiguous()
        dist.broadcast(dense.view(-1).view(torch.uint8), root, group=self._group)
        return tensor.copy_(dense)

    def barrier(self) -> None:
        self.all_reduce_(torch.zeros(1, device="cpu"))

    # torch.distributed --------------------------------------------------------------------------------

    @property
    def _is_nccl(self) -> bool:
        return self._backend.startswith("nccl")

    def _is_ours(self, tensor: Tensor) -> bool:
        """Whether the process group takes the tensor."""
        return tensor.device.type == self._device.type

    def _start_with_each_owner(
        self, collective: Callable[..., dist.Work | None], buffer: Tensor, counts: Sequence[int]
    ) -> Completion:
        """Reduce every segment to its owner, or broadcast it from there."""
        segments = buffer.split(list(counts))
        return _finish_of(
            *[
                collective(segment, owner, group=self._group, async_op=True)
                for owner, segment in enumerate(segments)
                if counts[owner]
            ]
        )

    def _find_local_rank(self) -> tuple[int, int]:
        """This rank's number on its host and their number there: torchrun's, or else by the hosts' names."""
        names = self.gather_bytes(socket.gethostname().encode())
        said = [environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        if launched_by_torchrun(environ) and said[:2] == [str(self.rank), str(self.size)] and said[3].isdigit():
            return int(said[2]), int(said[3])
        ranks = [rank for rank, name in enumerate(names) if name == names[self.rank]]
        return ranks.index(self.rank), len(ranks)


def _are_equal(counts: Sequence[int]) -> bool:
    return len(set(counts)) == 1


def _none_empty(buffer: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The segments, one value of no meaning in place of each empty one.

    Torch takes a list whose first tensors have the same address, as empty ones have, for one tensor given twice.
    """
    placeholders = iter(buffer.new_zeros(len(counts)).split(1))
    segments = buffer.split(list(counts))
    return [segment if len(segment) else next(placeholders) for segment in segments]


def _finish_of(*works: dist.Work | None) -> Completion:
    def finish() -> None:
        for work in works:
            if work is not None:
                work.wait()

    return finish

"""What the rest of the program may ask of a communicator.

All calls are collective: every rank makes the same calls in the same order. Buffers are contiguous
tensors. The payload of the two V-collectives is counted, so that a run can report what it moved.

The V-collectives can be started and waited for later, and can send half precision (`comm_dtype`, see
`kfac_dist.tensors.encoding`). Then each rank's values are rounded once and the owner sums them in the buffer's own
precision: on any number of ranks, one included, the error is that of one rounding.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Generic, Literal, TextIO, TypeVar

import torch
from torch import Tensor

from kfac_dist.errors import AgreedInputError, InputError
from kfac_dist.tensors.encoding import decode, encode, encoded_bytes

ReduceOp = Literal["sum", "mean", "min", "max"]
Result = TypeVar("Result")
Completion = Callable[[], None]
"""Completes what a backend has started."""
PartNumels = Sequence[Sequence[int]]
"""For each rank's segment the number of values in each of its parts."""


class Pending(Generic[Result]):
    """A collective under way: until `wait` its buffer must neither be read nor written."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: Result

    def wait(self) -> Result:
        """Complete it, once; further calls return the same result.

        On a GPU the current stream waits, not the host, where the backend can do so (NCCL).
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


class Communicator(ABC):
    """Collectives over all ranks of the job.

    Attributes:
        rank: This process's number, 0 … size − 1.
        size: Number of processes in the job.
        local_rank: This process's number on its own host.
        local_size: Number of the job's processes on this host.
        in_background: Whether what was started goes on while this process computes, rather than within calls only.
        is_overlapping: Whether an optimizer sends gradients within a backward pass that goes on.
        payload_bytes: Bytes handed to the V-collectives so far: the length of the whole buffer, as it goes on
            the comm_dtype, whatever the number of ranks, so that it can be compared with a formula.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    in_background: bool = False
    is_overlapping: bool = False
    payload_bytes: int = 0

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the log: the number of ranks and how they communicate."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    # V-collectives ------------------------------------------------------------------------------------

    def reduce_scatter_v(
        self,
        buffer: Tensor,
        counts: Sequence[int],
        comm_dtype: torch.dtype | None = None,
        part_numels: PartNumels | None = None,
    ) -> Tensor:
        """Average the ranks' buffers, leaving in each rank's buffer the mean of its own segment.

        Args:
            buffer: (Σ counts,), one segment a rank in rank order. Other ranks' segments become undefined.
            counts: Values in each rank's segment; zero is allowed; the same on every rank.
            comm_dtype: bfloat16 or float16 to send the values as; None, or the buffer's dtype, sends them as they are.
            part_numels: What float16 must not scale together, for each segment: the numbers of values in its parts
                (`FlatBuffer.part_numels`), Σ = counts; the same on every rank. Each segment is one part if None.

        Returns:
            (counts[rank],), a view of this rank's segment.

        Raises:
            ValueError: If `comm_dtype` is another dtype.
        """
        return self.start_reduce_scatter_v(buffer, counts, comm_dtype, part_numels).wait()

    def all_gather_v(
        self,
        buffer: Tensor,
        counts: Sequence[int],
        comm_dtype: torch.dtype | None = None,
        part_numels: PartNumels | None = None,
    ) -> None:
        """Complete a buffer of which each rank has filled its own segment, in place.

        Args:
            buffer: (Σ counts,), one segment a rank in rank order.
            counts: Values in each rank's segment; zero is allowed; the same on every rank.
            comm_dtype: As in `reduce_scatter_v`. All ranks end with the same rounded values, the owner too.
            part_numels: As in `reduce_scatter_v`.

        Raises:
            ValueError: If `comm_dtype` is another dtype.
        """
        self.start_all_gather_v(buffer, counts, comm_dtype, part_numels).wait()

    def start_reduce_scatter_v(
        self,
        buffer: Tensor,
        counts: Sequence[int],
        comm_dtype: torch.dtype | None = None,
        part_numels: PartNumels | None = None,
    ) -> Pending[Tensor]:
        """Start `reduce_scatter_v`; `wait()` gives its result."""
        own: Tensor = buffer.split(list(counts))[self.rank]
        if comm_dtype is None or comm_dtype == buffer.dtype:
            self.payload_bytes += buffer.numel() * buffer.element_size()
            finish = self._start_reduce_scatter_v(buffer, counts)
        else:
            finish = self._start_encoded_reduce_scatter_v(buffer, _parts_of(counts, part_numels), comm_dtype)

        def mean() -> Tensor:
            finish()
            return own.div_(self.size) if self.size > 1 else own

        return Pending(mean)

    def start_all_gather_v(
        self,
        buffer: Tensor,
        counts: Sequence[int],
        comm_dtype: torch.dtype | None = None,
        part_numels: PartNumels | None = None,
    ) -> Pending[None]:
        """Start `all_gather_v`."""
        if comm_dtype is None or comm_dtype == buffer.dtype:
            self.payload_bytes += buffer.numel() * buffer.element_size()
            return Pending(self._start_all_gather_v(buffer, counts))
        return Pending(self._start_encoded_all_gather_v(buffer, _parts_of(counts, part_numels), comm_dtype))

    def _start_encoded_reduce_scatter_v(
        self, buffer: Tensor, part_numels: PartNumels, comm_dtype: torch.dtype
    ) -> Completion:
        """Send every owner its segment encoded; the owner decodes and sums, in rank order."""
        sizes = [encoded_bytes(numels, comm_dtype) for numels in part_numels]
        self.payload_bytes += sum(sizes)
        segments = buffer.split([sum(numels) for numels in part_numels])
        sent = _empty_bytes(sum(sizes), buffer)
        for segment, numels, message in zip(segments, part_numels, sent.split(sizes), strict=True):
            encode(segment, numels, comm_dtype, out=message)
        received = _empty_bytes(self.size * sizes[self.rank], buffer)
        finish = self._start_all_to_all_v(sent, received, sizes)

        def add_up() -> None:
            finish()
            own, numels = segments[self.rank], part_numels[self.rank]
            first, *others = received.view(self.size, sizes[self.rank])
            decode(first, numels, comm_dtype, out=own)
            term = torch.empty_like(own)
            for other in others:
                decode(other, numels, comm_dtype, out=term)
                own += term

        return add_up

    def _start_encoded_all_gather_v(
        self, buffer: Tensor, part_numels: PartNumels, comm_dtype: torch.dtype
    ) -> Completion:
        """Gather all segments encoded; every rank decodes all of them."""
        sizes = [encoded_bytes(numels, comm_dtype) for numels in part_numels]
        self.payload_bytes += sum(sizes)
        segments = buffer.split([sum(numels) for numels in part_numels])
        gathered = _empty_bytes(sum(sizes), buffer)
        messages = gathered.split(sizes)
        encode(segments[self.rank], part_numels[self.rank], comm_dtype, out=messages[self.rank])
        finish = self._start_all_gather_v(gathered, sizes)

        def read() -> None:
            finish()
            for message, numels, segment in zip(messages, part_numels, segments, strict=True):
                decode(message, numels, comm_dtype, out=segment)

        return read

    @abstractmethod
    def _start_reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        """Start to leave in each rank's segment of the buffer the ranks' sum."""

    @abstractmethod
    def _start_all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> Completion:
        """Start to fill the other ranks' segments of the buffer, of any dtype."""

    @abstractmethod
    def _start_all_to_all_v(self, sent: Tensor, received: Tensor, sizes: Sequence[int]) -> Completion:
        """Start to send each rank its segment.

        Args:
            sent: (Σ sizes,), uint8, one segment a rank in rank order.
            received: (size · sizes[rank],), uint8: what all ranks sent this one, in rank order.
            sizes: Bytes that each rank is sent by every rank.
        """

    # Other collectives --------------------------------------------------------------------------------

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Combine the ranks' tensors in place; every rank ends with the result, which is returned."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite every rank's tensor with the root's; returned for convenience."""

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order, on every rank (start-up only: not fast, not pickled)."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        lengths[self.rank] = len(message)
        self._start_all_gather_v(lengths, [1] * self.size)()
        counts = lengths.tolist()
        gathered = torch.zeros(sum(counts), dtype=torch.uint8, device="cpu")
        if message:
            gathered[own_segment(self.rank, counts)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        self._start_all_gather_v(gathered, counts)()
        return [segment.numpy().tobytes() for segment in gathered.split(counts)]

    def broadcast_bytes(self, message: bytes, root: int = 0) -> bytes:
        """The root's message, on every rank (start-up only: not pickled)."""
        length = int(self.broadcast_(torch.tensor([len(message)], device="cpu"), root).item())
        if not length:
            return b""
        sent = torch.empty(length, dtype=torch.uint8, device="cpu")
        if self.rank == root:
            sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        return self.broadcast_(sent, root).numpy().tobytes()

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called."""

    def print_once(self, text: str, stream: TextIO | None = None) -> None:
        """Print on rank 0 only, at once; to standard output unless told otherwise."""
        if self.is_main:
            print(text, file=stream or sys.stdout, flush=True)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Turn an `InputError` on any rank into the same error on every rank.

        For set-up work that can fail on one rank only (a folder that one node lacks): without it the
        others would wait in their next collective for ever.

        Raises:
            AgreedInputError: On every rank, with the first failing rank's text.
        """
        problem = ""
        try:
            yield
        except InputError as error:
            problem = str(error)
        problems = self.gather_bytes(problem.encode(errors="backslashreplace"))  # file names may be no text
        failed = [rank for rank, text in enumerate(problems) if text]
        if failed:
            where = "" if len(failed) == self.size else f" (on rank {failed[0]} of {self.size})"
            raise AgreedInputError(problems[failed[0]].decode() + where)


def ranks_in_words(count: int) -> str:
    """For texts: ``1 rank``, ``2 ranks``."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def own_segment(rank: int, counts: Sequence[int]) -> slice:
    """Where a rank's segment lies in a buffer."""
    starts = [0, *accumulate(counts)]
    return slice(starts[rank], starts[rank + 1])


def _parts_of(counts: Sequence[int], part_numels: PartNumels | None) -> PartNumels:
    """The parts of each segment, which is one part where nothing is known of it."""
    if part_numels is None:
        return [[count] for count in counts]
    found = [sum(numels) for numels in part_numels]
    assert found == list(counts), f"part_numels must add up to counts {list(counts)}, got {found}"
    return part_numels


def already_complete() -> None:
    """The `Completion` of what is finished already."""


def _empty_bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)

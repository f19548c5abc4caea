"""What the rest of the program may ask of a communicator.

All calls are collective: every rank makes the same calls in the same order. Buffers are contiguous
tensors. The payload of the two V-collectives is counted, so that a run can report what it moved.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO

from torch import Tensor

from kfac_dist.errors import AgreedInputError, InputError

ReduceOp = Literal["sum", "mean", "min", "max"]


class Communicator(ABC):
    """Collectives over all ranks of the job.

    Attributes:
        rank: This process's number, 0 … size − 1.
        size: Number of processes in the job.
        local_rank: This process's number on its own host.
        local_size: Number of the job's processes on this host.
        payload_bytes: Bytes handed to `reduce_scatter_v` and `all_gather_v` so far: the length of the
            whole buffer, whatever the number of ranks, so that it can be compared with a formula.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    payload_bytes: int = 0

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the log: the number of ranks and how they communicate."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @abstractmethod
    def reduce_scatter_v(self, buffer: Tensor, counts: Sequence[int]) -> Tensor:
        """Average the ranks' buffers, leaving in each rank's buffer the mean of its own segment.

        Args:
            buffer: (Σ counts,), one segment a rank in rank order. Other ranks' segments become undefined.
            counts: Values in each rank's segment; zero is allowed; the same on every rank.

        Returns:
            (counts[rank],), a view of this rank's segment.
        """

    @abstractmethod
    def all_gather_v(self, buffer: Tensor, counts: Sequence[int]) -> None:
        """Complete a buffer of which each rank has filled its own segment, in place.

        Args:
            buffer: (Σ counts,), one segment a rank in rank order.
            counts: Values in each rank's segment; zero is allowed; the same on every rank.
        """

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Combine the ranks' tensors in place; every rank ends with the result, which is returned."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite every rank's tensor with the root's; returned for convenience."""

    @abstractmethod
    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order, on every rank (start-up only: not fast, not pickled)."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called."""

    def print_once(self, text: str, stream: TextIO | None = None) -> None:
        """Print on rank 0 only, at once; to standard output unless told otherwise."""
        if self.is_main:
            print(text, file=stream or sys.stdout, flush=True)

    @contextmanager
    def agree(self) -> Iterator[None]:
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

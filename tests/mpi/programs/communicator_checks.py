"""Checks of every collective on however many ranks it is started with; the last line counts what was checked."""

import os
import sys
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.communicator.base import ReduceOp
from kfac_dist.errors import InputError
from kfac_dist.vocabulary import ReduceScatterAlgorithm

DTYPES = (torch.float32, torch.float64)


def segment_layouts(size: int) -> list[list[int]]:
    """Counts of each rank's segment: uneven, empty ones in every place, one rank with all, nothing at all."""
    return [
        [3 * rank + 1 for rank in range(size)],
        [0 if rank % 2 == 0 else 5 for rank in range(size)],
        [7 if rank % 2 == 0 else 0 for rank in range(size)],
        [0] * (size - 1) + [11],
        [0] * size,
        [50_000 + rank for rank in range(size)],
    ]


def values_of(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """A rank's buffer: small whole numbers, so that sums are exact in either precision."""
    return ((torch.arange(count) * (rank + 2)) % 97 + rank).to(dtype)


def check_reduce_scatter(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for dtype in DTYPES:
        for counts in segment_layouts(size):
            total, begin = sum(counts), sum(counts[:rank])
            buffer = values_of(rank, total, dtype)
            before = communicator.payload_bytes
            own = communicator.reduce_scatter_v(buffer, counts)
            expected = torch.stack([values_of(other, total, torch.float64) for other in range(size)]).sum(0) / size
            assert own.dtype == dtype
            assert own.shape == (counts[rank],)
            torch.testing.assert_close(own.double(), expected[begin : begin + counts[rank]], rtol=1e-6, atol=0)
            assert torch.equal(own, buffer[begin : begin + counts[rank]])
            if counts[rank]:
                assert own.data_ptr() == buffer[begin:].data_ptr(), "the result must be a view of the buffer"
            assert communicator.payload_bytes - before == total * dtype.itemsize


def check_all_gather(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for dtype in DTYPES:
        for counts in segment_layouts(size):
            expected = torch.cat([values_of(other, count, dtype) for other, count in enumerate(counts)])
            buffer = torch.full_like(expected, -1.0)
            begin = sum(counts[:rank])
            buffer[begin : begin + counts[rank]] = values_of(rank, counts[rank], dtype)
            before = communicator.payload_bytes
            communicator.all_gather_v(buffer, counts)
            assert torch.equal(buffer, expected)
            assert communicator.payload_bytes - before == len(expected) * dtype.itemsize


def check_all_reduce_and_broadcast(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for dtype in DTYPES:
        every = torch.stack([values_of(other, 12, dtype) for other in range(size)])
        results: list[tuple[ReduceOp, Tensor]] = [
            ("sum", every.sum(0)),
            ("mean", every.mean(0)),
            ("min", every.amin(0)),
            ("max", every.amax(0)),
        ]
        for op, expected in results:
            tensor = values_of(rank, 12, dtype).view(3, 4)
            before = communicator.payload_bytes
            result = communicator.all_reduce_(tensor, op)
            assert result is tensor
            torch.testing.assert_close(tensor, expected.view(3, 4), rtol=1e-6, atol=0)
            assert communicator.payload_bytes == before, "only the V-collectives count"
        for root in range(size):
            tensor = values_of(rank, 12, dtype)
            assert torch.equal(communicator.broadcast_(tensor, root), values_of(root, 12, dtype))
            assert torch.equal(tensor, values_of(root, 12, dtype))
    flag = torch.tensor(rank == size - 1)
    communicator.broadcast_(flag, size - 1)
    assert flag.item() is True


def check_gather_bytes(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    assert communicator.gather_bytes(b"") == [b""] * size
    expected = [bytes([other]) * (3 * other) for other in range(size)]  # rank 0 has nothing to say
    assert communicator.gather_bytes(expected[rank]) == expected
    assert communicator.gather_bytes(b"x" if rank == 0 else b"") == [b"x"] + [b""] * (size - 1)
    assert [m.decode() for m in communicator.gather_bytes("Größe".encode())] == ["Größe"] * size


def check_broadcast_bytes(communicator: Communicator) -> None:
    for root in range(communicator.size):
        for message in (b"", b"x", bytes(range(256)) * 999):
            assert communicator.broadcast_bytes(message if communicator.rank == root else b"other", root) == message


def check_agree(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank

    def agreed_error(failing: set[int]) -> str | None:
        try:
            with communicator.raise_on_all_ranks():
                if rank in failing:
                    raise InputError(f"folder number {rank} is missing")
        except InputError as error:
            return str(error)
        return None

    assert agreed_error(set()) is None
    where = "" if size == 1 else f" (on rank {size - 1} of {size})"
    assert agreed_error({size - 1}) == f"folder number {size - 1} is missing{where}"
    assert agreed_error(set(range(size))) == "folder number 0 is missing"
    assert agreed_error(set()) is None, "an error must leave nothing behind"


def check_ranks(communicator: Communicator) -> None:
    size = communicator.size
    assert size == int(sys.argv[1])
    assert (communicator.rank, size) == launcher_says()
    assert communicator.is_main == (communicator.rank == 0)
    # All ranks of a test run on one host.
    local_ranks = communicator.gather_bytes(str(communicator.local_rank).encode())
    assert sorted(int(text) for text in local_ranks) == list(range(size))
    assert communicator.local_size == size


def launcher_says() -> tuple[int, int]:
    """This rank and the number of ranks: torchrun's, or else MPI's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def check_automatic_choice(communicator: Communicator) -> None:
    """The choice by measurement is one of the algorithms, and the same on every rank."""
    name = communicator.reduce_scatter_algorithm  # type: ignore[attr-defined]
    assert name in get_args(ReduceScatterAlgorithm)
    assert communicator.gather_bytes(name.encode()) == [name.encode()] * communicator.size
    assert f"{communicator.size} rank" in communicator.description
    assert name in communicator.description


def main() -> int:
    automatic = create_communicator("auto")
    checks: list[tuple[Callable[[Communicator], None], Communicator]] = [
        (check_reduce_scatter, create_communicator(algorithm)) for algorithm in get_args(ReduceScatterAlgorithm)
    ]
    checks += [(check_reduce_scatter, automatic)]
    checks += [
        (check, automatic)
        for check in (
            check_all_gather,
            check_all_reduce_and_broadcast,
            check_gather_bytes,
            check_broadcast_bytes,
            check_agree,
            check_ranks,
            check_automatic_choice,
        )
    ]
    for check, communicator in checks:
        check(communicator)
        communicator.barrier()
    automatic.print_once(f"{len(checks)} checks passed on {automatic.size} ranks")
    return 0


if __name__ == "__main__":
    launch.run(main)

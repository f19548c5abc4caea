"""The collectives of one backend; arguments: number of ranks, backend.

gloo      NcclCommunicator over gloo, on CPU tensors
staged    MPI, as if CPU tensors were a device's: through the buffers of Staging
dlpack    MPI, tensors handed over by DLPack, as a device's are where MPI is CUDA-aware
nccl      on this rank's GPU, as the next
mpi-gpu   MPI; ranks may share a GPU
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import communicator_checks as checks
import torch
from torch import Tensor

from kfac_dist.communicator import Communicator, MpiCommunicator, create_communicator, launch, mpi
from kfac_dist.communicator.nccl import NcclCommunicator
from kfac_dist.communicator.staging import WHOLE
from kfac_dist.devices import choose_device
from kfac_dist.tensors.encoding import decode, encode, encoded_bytes
from kfac_dist.vocabulary import ReduceScatterAlgorithm

COMM_DTYPES = (torch.bfloat16, torch.float16)


class StagedCommunicator(MpiCommunicator):
    @contextmanager
    def _for_mpi(self, tensor: Tensor, fetch: slice = WHOLE, store: slice = WHOLE) -> Iterator[Tensor]:
        self._staging._pin_memory = False
        with self._staging.staged(tensor, fetch, store) as host:
            assert not tensor.numel() or host.data_ptr() != tensor.data_ptr()
            yield host


def create(backend: str, algorithm: ReduceScatterAlgorithm) -> Communicator:
    if backend == "staged":
        return StagedCommunicator(algorithm)
    if backend == "dlpack":
        mpi._mpi_buffer = lambda tensor: tensor  # type: ignore[assignment]
        return MpiCommunicator(algorithm)
    if backend == "gloo":
        return NcclCommunicator(MpiCommunicator("reduce"), torch.device("cpu"), "gloo")
    device = choose_device("cuda", MpiCommunicator("reduce").local_rank)
    torch.set_default_device(device)
    return create_communicator(algorithm, "nccl" if backend == "nccl" else "mpi", device)


def layouts(size: int) -> list[list[int]]:
    return [*checks.segment_layouts(size), [6] * size, [1023 + rank for rank in range(size)]]


def random_values(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """A rank's buffer: magnitudes as far apart as those of Fisher factors."""
    generator = torch.Generator("cpu").manual_seed(rank)
    exponents = torch.rand(count, generator=generator, device="cpu", dtype=torch.float64) * 16 - 12
    return (10**exponents * (-1) ** rank).to(torch.get_default_device(), dtype)


def through(values: Tensor, comm_dtype: torch.dtype) -> Tensor:
    message = torch.empty(encoded_bytes(len(values), comm_dtype), dtype=torch.uint8)
    encode(values, comm_dtype, message)
    out = torch.empty_like(values)
    decode(message, comm_dtype, out)
    return out


def check_encoded_reduce_scatter(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for comm_dtype in COMM_DTYPES:
        for dtype in checks.DTYPES:
            for counts in layouts(size):
                buffers = [random_values(other, sum(counts), dtype) for other in range(size)]
                segments = [through(buffer.split(counts)[rank], comm_dtype) for buffer in buffers]
                buffer = buffers[rank].clone()
                before = communicator.payload_bytes
                own = communicator.reduce_scatter_v(buffer, counts, comm_dtype)
                assert torch.equal(own, sum(segments[1:], segments[0]) / size), (
                    "each value rounded once, summed in dtype"
                )
                assert torch.equal(own, buffer.split(counts)[rank])
                expected_bytes = sum(encoded_bytes(count, comm_dtype) for count in counts)
                assert communicator.payload_bytes - before == expected_bytes


def check_encoded_all_gather(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for comm_dtype in COMM_DTYPES:
        for dtype in checks.DTYPES:
            for counts in layouts(size):
                segments = [random_values(other, count, dtype) for other, count in enumerate(counts)]
                expected = torch.cat([through(segment, comm_dtype) for segment in segments])
                buffer = torch.full_like(expected, -1.0)
                buffer.split(counts)[rank].copy_(segments[rank])
                before = communicator.payload_bytes
                communicator.all_gather_v(buffer, counts, comm_dtype)
                assert torch.equal(buffer, expected), "all ranks hold the rounded values, the owner too"
                expected_bytes = sum(encoded_bytes(count, comm_dtype) for count in counts)
                assert communicator.payload_bytes - before == expected_bytes


def check_one_rank_is_not_finite(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for comm_dtype in (None, *COMM_DTYPES):
        buffer = torch.ones(2000 * size)
        buffer[5] = torch.inf if rank == size - 1 else 1.0
        own = communicator.reduce_scatter_v(buffer, [2000] * size, comm_dtype)
        assert torch.equal(own.isinf(), (torch.arange(2000) == 5).logical_and(torch.tensor(rank == 0)))


def check_equal_segments(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    for dtype in checks.DTYPES:
        whole = torch.stack([checks.values_of(other, 6 * size, dtype) for other in range(size)])
        own = communicator.reduce_scatter_v(whole[rank].clone(), [6] * size)
        torch.testing.assert_close(own, whole.mean(0)[6 * rank : 6 * rank + 6], rtol=1e-6, atol=0)
        buffer = torch.zeros(6 * size, dtype=dtype)
        buffer[6 * rank : 6 * rank + 6] = whole[rank, :6]
        communicator.all_gather_v(buffer, [6] * size)
        assert torch.equal(buffer, whole[:, :6].flatten())


def check_other_types(communicator: Communicator) -> None:
    """Gathering takes any type; a wire of the buffer's own type is none."""
    size, rank = communicator.size, communicator.rank
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.int64):
        for counts in layouts(size)[:-2]:
            expected = torch.cat([checks.values_of(other, count, dtype) for other, count in enumerate(counts)])
            buffer = torch.zeros_like(expected)
            buffer.split(counts)[rank].copy_(expected.split(counts)[rank])
            before = communicator.payload_bytes
            communicator.all_gather_v(buffer, counts, dtype if dtype.is_floating_point else None)
            assert torch.equal(buffer, expected)
            assert communicator.payload_bytes - before == len(expected) * dtype.itemsize
    weight = torch.full((2, 3, 4, 4), float(rank)).to(torch.bfloat16, memory_format=torch.channels_last)
    communicator.broadcast_(weight, size - 1)
    assert bool((weight == size - 1).all())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def check_several_in_flight(communicator: Communicator) -> None:
    size, rank = communicator.size, communicator.rank
    counts = [3 * other + 1 for other in range(size)]
    for comm_dtype in (None, *COMM_DTYPES):
        buffers = [torch.full((sum(counts),), float(number + rank)) for number in range(3)]
        pending = [communicator.start_reduce_scatter_v(buffer, counts, comm_dtype) for buffer in buffers]
        gathered = torch.full((sum(counts),), float(rank))
        gathering = communicator.start_all_gather_v(gathered, counts, comm_dtype)
        for number, (buffer, reduction) in enumerate(zip(buffers, pending, strict=True)):
            expected = torch.full((counts[rank],), number + (size - 1) / 2)
            own = reduction.wait()
            assert torch.equal(own, expected)
            assert torch.equal(reduction.wait(), expected), "waiting again must not divide again"
            assert own.data_ptr() == buffer.split(counts)[rank].data_ptr()
        gathering.wait()
        assert torch.equal(gathered, torch.cat([torch.full((n,), float(other)) for other, n in enumerate(counts)]))


def check_bad_wire(communicator: Communicator) -> None:
    for call in (communicator.reduce_scatter_v, communicator.all_gather_v):
        try:
            call(torch.zeros(communicator.size), [1] * communicator.size, torch.int8)  # type: ignore[operator]
        except ValueError as error:
            assert "comm_dtype must be torch.bfloat16, torch.float16 or None, got torch.int8" in str(error)  # noqa: PT017
        else:
            raise AssertionError("int8 was taken")


def main() -> int:
    backend = sys.argv[2]
    algorithms: list[ReduceScatterAlgorithm] = ["reduce"]
    if backend in ("staged", "dlpack", "mpi-gpu"):
        algorithms += ["native", "ireduce"]
    communicators = [create(backend, algorithm) for algorithm in algorithms]
    every: list[Callable[[Communicator], None]] = [
        checks.check_reduce_scatter,
        checks.check_all_gather,
        checks.check_all_reduce_and_broadcast,
        checks.check_gather_bytes,
        checks.check_agree,
        checks.check_ranks,
        check_encoded_reduce_scatter,
        check_encoded_all_gather,
        check_one_rank_is_not_finite,
        check_equal_segments,
        check_other_types,
        check_several_in_flight,
        check_bad_wire,
    ]
    for communicator in communicators:
        for check in every:
            check(communicator)
            communicator.barrier()
    communicators[0].print_once(communicators[0].description)
    communicators[0].print_once(f"{len(every)} checks passed on {communicators[0].size} ranks")
    return 0


if __name__ == "__main__":
    launch.run(main)

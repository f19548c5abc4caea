"""The collectives of one backend; arguments: number of ranks, backend.

gloo      a process group over gloo, on CPU tensors, connected by MPI
staged    MPI, as if CPU tensors were a device's: through the buffers of Staging
dlpack    MPI, tensors handed over by DLPack, as a device's are where MPI is CUDA-aware
pieces    MPI, as if it counted no further than 1000
lists     a process group over gloo that is treated as NCCL's is: uneven segments go as lists of tensors
torch     torch.distributed's default group, started by torchrun; nothing may load MPI
torch-staged  the same, as if CPU tensors were a device's
nccl      on this rank's GPU, as the next
mpi-gpu   MPI; ranks may share a GPU
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import communicator_checks as checks
import torch
import torch.distributed as dist
from torch import Tensor

from kfac_dist.communicator import Communicator, create_communicator, launch
from kfac_dist.communicator.connect import connect_by_default_group, connect_gpus
from kfac_dist.communicator.devices import choose_device
from kfac_dist.communicator.process_group import ProcessGroupCommunicator
from kfac_dist.communicator.staging import WHOLE, Staging
from kfac_dist.tensors.encoding import decode, encode, encoded_bytes
from kfac_dist.vocabulary import ReduceScatterAlgorithm

COMM_DTYPES = (torch.bfloat16, torch.float16)


MAX_COUNT = 1000


def create_over_mpi(backend: str, algorithm: ReduceScatterAlgorithm) -> Communicator:
    from kfac_dist.communicator import MpiCommunicator, mpi

    class StagedCommunicator(MpiCommunicator):
        @contextmanager
        def _for_mpi(self, tensor: Tensor, fetch: slice = WHOLE, store: slice = WHOLE) -> Iterator[Tensor]:
            self._staging._pin_memory = False
            with self._staging.staged(tensor, fetch, store) as host:
                assert not tensor.numel() or host.data_ptr() != tensor.data_ptr()
                yield host

    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    def counted(tensor: Tensor) -> Any:
        assert tensor.numel() <= MAX_COUNT, f"{tensor.numel()} values in one call"
        return tensor.numpy()

    if backend == "staged":
        return StagedCommunicator(algorithm)
    if backend == "dlpack":
        mpi._mpi_buffer = as_it_is
    if backend == "pieces":
        mpi._MAX_COUNT, mpi._mpi_buffer = MAX_COUNT, counted
    return MpiCommunicator(algorithm)


class Works(list[Any]):
    def wait(self) -> None:
        for work in self:
            work.wait()


def reduce_scatter_of_lists(output: Tensor, segments: Sequence[Tensor], **settings: Any) -> Any:
    """What torch makes of uneven lists over NCCL, in pieces that gloo knows; in place, as it is called here."""
    assert output.data_ptr() == segments[dist.get_rank()].data_ptr()
    assert all_addresses_differ(segments)
    return Works([dist.reduce(segment, owner, **settings) for owner, segment in enumerate(segments)])


def all_gather_of_lists(segments: Sequence[Tensor], own: Tensor, **settings: Any) -> Any:
    assert own.data_ptr() == segments[dist.get_rank()].data_ptr()
    assert all_addresses_differ(segments)
    return Works([dist.broadcast(segment, owner, **settings) for owner, segment in enumerate(segments)])


def all_addresses_differ(segments: Sequence[Tensor]) -> bool:
    addresses = {segment.data_ptr() for segment in segments}
    return len(addresses) == len(segments) == dist.get_world_size() and 0 not in addresses


class StagedGroupCommunicator(ProcessGroupCommunicator):
    """Takes the group's tensors for those that are staged, and all others for a GPU's."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._staging = CountingStaging(pin_memory=False)

    def _is_ours(self, tensor: Tensor) -> bool:
        return getattr(self._staging, "num_borrowed", 1) > 0


class CountingStaging(Staging):
    num_borrowed = 0

    @contextmanager
    def staged(self, tensor: Tensor, fetch: slice, store: slice) -> Iterator[Tensor]:
        with super().staged(tensor, fetch, store) as host:
            self.num_borrowed += 1
            yield host
            self.num_borrowed -= 1


def create(backend: str, algorithm: ReduceScatterAlgorithm) -> Communicator:
    if backend in ("staged", "dlpack", "pieces"):
        return create_over_mpi(backend, algorithm)
    if backend == "torch":
        return create_communicator(algorithm, "torch", torch.device("cpu"))
    if backend == "torch-staged":
        group = connect_by_default_group()
        return StagedGroupCommunicator(group._group, "gloo", torch.device("cpu"))
    if backend in ("gloo", "lists"):
        communicator = connect_gpus(create_over_mpi("mpi", "reduce"), torch.device("cpu"), "gloo")
        if backend == "lists":
            communicator._backend = "nccl"
            dist.reduce_scatter, dist.all_gather = reduce_scatter_of_lists, all_gather_of_lists
        return communicator
    device = choose_device("cuda", create_over_mpi("mpi", "reduce").local_rank)
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
    message = torch.empty(encoded_bytes([len(values)], comm_dtype), dtype=torch.uint8)
    encode(values, [len(values)], comm_dtype, message)
    out = torch.empty_like(values)
    decode(message, [len(values)], comm_dtype, out)
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
                expected_bytes = sum(encoded_bytes([count], comm_dtype) for count in counts)
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
                expected_bytes = sum(encoded_bytes([count], comm_dtype) for count in counts)
                assert communicator.payload_bytes - before == expected_bytes


def check_parts(communicator: Communicator) -> None:
    """Each part of a segment is scaled by itself: beside 1e2, values of 1e-9 keep their 11 bits."""
    size, rank = communicator.size, communicator.rank
    parts = [[5, 0, 1200 + owner, 3] for owner in range(size)]
    counts = [sum(numels) for numels in parts]
    magnitudes = torch.cat(
        [
            torch.full((numel,), magnitude)
            for own in parts
            for numel, magnitude in zip(own, (1e2, 1.0, 1e-9, 1e4), strict=True)
        ]
    )
    for call in ("reduce", "gather"):
        buffer = magnitudes * (1 + rank)
        expected = magnitudes * (size + 1) / 2
        before = communicator.payload_bytes
        if call == "reduce":
            buffer = communicator.reduce_scatter_v(buffer, counts, torch.float16, parts)
            expected = expected.split(counts)[rank]
        else:
            buffer = expected.clone()
            communicator.all_gather_v(buffer, counts, torch.float16, parts)
        torch.testing.assert_close(buffer, expected, rtol=2**-10, atol=0)
        assert communicator.payload_bytes - before == sum(encoded_bytes(own, torch.float16) for own in parts)


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
    if backend in ("staged", "dlpack", "pieces", "mpi-gpu"):
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
        check_parts,
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
    if backend.startswith("torch"):
        assert "mpi4py" not in sys.modules
    communicators[0].print_once(communicators[0].description)
    communicators[0].print_once(f"{len(every)} checks passed on {communicators[0].size} ranks")
    return 0


if __name__ == "__main__":
    launch.run(main)

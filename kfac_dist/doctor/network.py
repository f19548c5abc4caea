"""What the ranks' collectives give and take: correctness, latency, bandwidth. Every rank calls; all get the same."""

import time
from collections.abc import Mapping, Sequence

import torch

from kfac_dist.communicator import Communicator, MpiCommunicator
from kfac_dist.doctor.findings import Finding

_BANDWIDTH_BYTES = 8 << 20
_BANDWIDTH_REPEATS = 3
_LATENCY_SECONDS = 0.2
_HIGH_LATENCY_SECONDS = 1e-3
_LOW_BANDWIDTH = {"note": 1e9, "warning": 125e6}  # bytes a second between hosts: 10 and 1 Gbit/s


def measure_network(communicator: Communicator, num_hosts: int) -> list[Finding]:
    """Allreduce and ReduceScatterV between the ranks; collective, under a second on an idle machine."""
    if communicator.size == 1:
        return [Finding("MPI collectives", "ok", "one rank: nothing to send")]
    expected = communicator.size * (communicator.size + 1) / 2
    summed = float(communicator.all_reduce_(torch.tensor([communicator.rank + 1.0], dtype=torch.float64)))
    latency = all_reduce_seconds(communicator, 1, repeats_in=_LATENCY_SECONDS)
    seconds = all_reduce_seconds(communicator, _BANDWIDTH_BYTES // 4, num_repeats=_BANDWIDTH_REPEATS)
    by_algorithm = MpiCommunicator("auto").reduce_scatter_seconds
    return [
        check_sum(summed, expected),
        check_latency(latency, num_hosts),
        check_bandwidth(_BANDWIDTH_BYTES / seconds, num_hosts),
        describe_reduce_scatter(by_algorithm),
    ]


def all_reduce_seconds(
    communicator: Communicator, count: int, num_repeats: int = 3, repeats_in: float | None = None
) -> float:
    """Seconds of one all-reduce of `count` float32 values, the slowest rank's best; collective.

    Args:
        communicator: The job's.
        count: Values.
        num_repeats: How often to measure.
        repeats_in: Instead: as often as fits into these seconds, at most 100 times.
    """
    tensor = torch.zeros(count)
    communicator.all_reduce_(tensor)  # sets up connections
    if repeats_in is not None:
        first = torch.tensor([_timed(communicator, tensor)], dtype=torch.float64)
        slowest = float(communicator.all_reduce_(first, "max"))  # the same on every rank
        num_repeats = max(3, min(100, int(repeats_in / max(slowest, 1e-6))))
    fastest = min(_timed(communicator, tensor) for _ in range(num_repeats))
    return float(communicator.all_reduce_(torch.tensor([fastest], dtype=torch.float64), "max"))


def _timed(communicator: Communicator, tensor: torch.Tensor) -> float:
    start = time.perf_counter()
    communicator.all_reduce_(tensor)
    return time.perf_counter() - start


def check_sum(summed: float, expected: float) -> Finding:
    """A small all-reduce against the sum that it must give."""
    if summed == expected:
        return Finding("MPI collectives", "ok", "an all-reduce over all ranks gives the right sum")
    remedy = (
        "try mpirun --mca pml ob1 --mca btl self,sm,tcp; if the sum is right then, the network's driver is at fault"
    )
    return Finding("MPI collectives", "error", f"an all-reduce gave {summed:g} instead of {expected:g}", remedy)


def check_latency(seconds: float, num_hosts: int) -> Finding:
    """Seconds of an all-reduce of one value."""
    found = f"{1e6 * seconds:.0f} µs for an all-reduce of one value"
    if seconds <= _HIGH_LATENCY_SECONDS:
        return Finding("MPI latency", "ok", found)
    if num_hosts == 1:
        remedy = "at most as many ranks as cores; stop what else runs on this host"
    else:
        remedy = f"{_interface_remedy()}; at most as many ranks as cores"
    return Finding("MPI latency", "note", f"{found}, more than {1e3 * _HIGH_LATENCY_SECONDS:g} ms", remedy)


def check_bandwidth(bytes_per_second: float, num_hosts: int) -> Finding:
    """Bytes of an all-reduce by the seconds it took; between hosts a low one hints at the wrong network."""
    found = f"{bytes_per_second / 1e9:.2f} GB/s for an all-reduce of {_BANDWIDTH_BYTES >> 20} MiB"
    if num_hosts > 1 and bytes_per_second < _LOW_BANDWIDTH["warning"]:
        return Finding("MPI bandwidth", "warning", f"{found}, no more than 1 Gbit/s Ethernet", _interface_remedy())
    if num_hosts > 1 and bytes_per_second < _LOW_BANDWIDTH["note"]:
        return Finding("MPI bandwidth", "note", f"{found}, no more than 10 Gbit/s Ethernet", _interface_remedy())
    return Finding("MPI bandwidth", "ok", found)


def _interface_remedy() -> str:
    return (
        "let MPI use the fast network: mpirun --mca pml ucx where there is RDMA, else "
        "--mca btl_tcp_if_include <interface>"
    )


def describe_reduce_scatter(by_algorithm: Mapping[str, float]) -> Finding:
    """Seconds of ReduceScatterV by algorithm, as training measures them at its start."""
    fastest: Sequence[tuple[str, float]] = sorted(by_algorithm.items(), key=lambda item: item[1])
    if not fastest:
        return Finding("ReduceScatterV", "ok", "one algorithm only")
    texts = [f"{name} {1e3 * seconds:.1f} ms" for name, seconds in fastest]
    return Finding("ReduceScatterV", "ok", f"fastest first: {', '.join(texts)}")

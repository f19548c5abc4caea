"""Rules on the ranks of a job: launcher, world size, hosts, versions, threads against cores, and the network."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kfac_dist.communicator import Communicator, launch
from kfac_dist.communicator.devices import RankDevice
from kfac_dist.doctor.findings import Finding, from_error, merge
from kfac_dist.errors import InputError

_BANDWIDTH_BYTES = 8 << 20
_HIGH_LATENCY_SECONDS = 1e-3
_LOW_BYTES_PER_SECOND = 125e6  # between hosts: 1 Gbit/s
# What each launcher leaves in the environment, the most telling first.
_LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun; torch.distributed connects its ranks, not MPI",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "mpirun of the MPICH family, or srun with PMI",
    "PMIX_RANK": "srun or another launcher with PMIx",
    "SLURM_STEP_ID": "srun",
}


@dataclass
class RankFacts:
    """What the rules that compare ranks need to know of one.

    Attributes:
        device: The rank's host, and what it computes on.
        versions: Of the software that all ranks must agree in.
        threads: Threads that torch uses for one operation.
        threads_set: Whether OMP_NUM_THREADS asked for that number.
        cores: Those that this rank may run on.
        num_cpus: Logical cores of the host, whether this rank may use them or not.
    """

    device: RankDevice
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    threads_set: bool = False
    cores: list[int] = field(default_factory=list)
    num_cpus: int = 1


def check_launcher(environment: Mapping[str, str]) -> Finding:
    """What started this process, as far as its environment tells."""
    names = [name for variable, name in _LAUNCHERS.items() if variable in environment]
    return Finding("launcher", "ok", names[0] if names else "none: plain python is one rank")


def check_size(size: int, environment: Mapping[str, str]) -> Finding:
    """MPI's number of ranks against the number that the launcher promised."""
    try:
        launch.check_world_size(size, environment)
    except InputError as error:
        return from_error("world size", error)
    promise = launch.promised_size(environment)
    if promise is None or promise[1] == size:
        return Finding("world size", "ok", f"{size}, as promised by {promise[0]}" if promise else f"{size}")
    found = f"{size}, although {promise[0]}={promise[1]}: {launch.ALLOW_SIZE_VARIABLE}=1 allows it"
    return Finding("world size", "note", found, f"unset {launch.ALLOW_SIZE_VARIABLE} unless that is meant")


def check_hosts(facts: Sequence[RankFacts]) -> Finding:
    """How the ranks are spread over the hosts."""
    by_host = ranks_by_host(facts)
    layout = ", ".join(f"{len(ranks)} on {host}" for host, ranks in by_host.items())
    found = f"{len(facts)} {'rank' if len(facts) == 1 else 'ranks'}: {layout}"
    if len({len(ranks) for ranks in by_host.values()}) == 1:
        return Finding("hosts", "ok", found)
    remedy = "mpirun --map-by ppr:N:node with N ranks on each host"
    return Finding("hosts", "note", f"{found}; the slowest host sets the pace", remedy)


def check_versions(facts: Sequence[RankFacts]) -> list[Finding]:
    """All ranks should run the same software."""
    findings = []
    for name in dict.fromkeys(name for rank_facts in facts for name in rank_facts.versions):
        versions = [rank_facts.versions.get(name, "none") for rank_facts in facts]
        if len(set(versions)) > 1:
            found = f"{name} differs between ranks: {', '.join(dict.fromkeys(versions))}"
            remedy = "one environment for all hosts: a shared file system, a container, or scripts/setup.sh on each"
            findings.append(Finding("versions", "error" if name == "kfac_dist" else "warning", found, remedy))
    return findings


def ranks_by_host(facts: Sequence[RankFacts]) -> dict[str, list[int]]:
    """Ranks of each host, hosts in the order of their first rank."""
    by_host: dict[str, list[int]] = {}
    for rank, rank_facts in enumerate(facts):
        by_host.setdefault(rank_facts.device.host, []).append(rank)
    return by_host


def check_threads(facts: Sequence[RankFacts]) -> list[Finding]:
    """Each host's ranks and threads against the cores that they may run on."""
    by_host = ranks_by_host(facts)
    findings = [[_threads_of_rank(own, [facts[rank] for rank in by_host[own.device.host]])] for own in facts]
    return merge(findings)  # hosts that look alike become one


def _threads_of_rank(own: RankFacts, on_host: Sequence[RankFacts]) -> Finding:
    """One rank among all on its host."""
    num_ranks, num_cores = len(on_host), len({core for rank_facts in on_host for core in rank_facts.cores})
    total = sum(rank_facts.threads for rank_facts in on_host)
    share = max(1, num_cores // num_ranks)
    unbind = "mpirun --bind-to none (scripts/mpirun.sh does it)"
    have = f"{own.threads} per rank, {len(own.cores)} of the host's {own.num_cpus} cores to run on"
    if len(own.cores) == 1 and own.num_cpus > num_ranks:
        found = f"{have}, although there are more cores than ranks ({num_ranks}): threads starve"
        remedy = f"{unbind}, or --map-by ppr:{num_ranks}:node:PE=<cores per rank>, or a container with more cores"
        return Finding("threads", "warning", found, remedy)
    if own.threads > len(own.cores) or total > num_cores:
        found = f"{have}; {total} threads of {num_ranks} ranks on {num_cores} cores take turns"
        remedy = f"export OMP_NUM_THREADS={min(share, len(own.cores))}"
        if num_ranks > num_cores:
            remedy = f"at most {num_cores} ranks per host (mpirun -n); or, if they are bound, {unbind}"
        return Finding("threads", "warning", found, remedy)
    if own.threads_set and 2 * total <= num_cores:
        found = f"{have}; OMP_NUM_THREADS leaves {num_cores - total} of {num_cores} cores idle"
        return Finding("threads", "note", found, f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={share}")
    return Finding("threads", "ok", have)


def measure_network(communicator: Communicator, num_hosts: int) -> list[Finding]:
    """An all-reduce of one value and one of 8 MiB; collective, under a second on an idle machine."""
    if communicator.size == 1:
        return []
    latency = _all_reduce_seconds(communicator, 1, num_repeats=20)
    seconds = _all_reduce_seconds(communicator, _BANDWIDTH_BYTES // 4, num_repeats=3)
    return [check_network(latency, _BANDWIDTH_BYTES / seconds, num_hosts)]


def _all_reduce_seconds(communicator: Communicator, num_values: int, num_repeats: int) -> float:
    """Seconds of one all-reduce: each rank's best, and of these the slowest rank's."""
    tensor = torch.zeros(num_values)
    communicator.all_reduce_(tensor)  # sets up connections
    fastest = float("inf")
    for _ in range(num_repeats):
        start = time.perf_counter()
        communicator.all_reduce_(tensor)
        fastest = min(fastest, time.perf_counter() - start)
    return float(communicator.all_reduce_(torch.tensor(fastest, dtype=torch.float64), "max"))


def check_network(latency_seconds: float, bytes_per_second: float, num_hosts: int) -> Finding:
    """What was measured; between hosts a low bandwidth hints at the wrong network."""
    found = f"an all-reduce: {1e6 * latency_seconds:.0f} µs for one value, {bytes_per_second / 1e9:.2f} GB/s for 8 MiB"
    is_narrow = num_hosts > 1 and bytes_per_second < _LOW_BYTES_PER_SECOND
    if latency_seconds <= _HIGH_LATENCY_SECONDS and not is_narrow:
        return Finding("network", "ok", found)
    remedy = "at most as many ranks as cores; stop what else runs on these hosts"
    if num_hosts > 1:
        remedy += "; mpirun --mca pml ucx where there is RDMA, else --mca btl_tcp_if_include <the fast interface>"
    return Finding("network", "warning" if is_narrow else "note", f"{found}: slow", remedy)

"""Rules on the ranks of a job: launcher, world size, hosts, versions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kfac_dist.communicator import launch
from kfac_dist.doctor.findings import Finding
from kfac_dist.errors import InputError


@dataclass
class RankFacts:
    """What the rules that compare ranks need to know of one; what a rank could not find out keeps its default.

    Attributes:
        host: The host's name.
        local_size: Ranks that MPI sees on this host.
        num_cpus: Logical cores of the host, in this rank's allowance or not.
        cores: Those that this rank may run on.
        cpu_quota: Cores' worth of time that the container allows; None without such a limit.
        threads: Threads that torch uses for one operation.
        threads_set: Whether OMP_NUM_THREADS asked for that number.
        versions: Of the packages that all ranks must agree in.
        num_gpus: GPUs that torch sees.
        gpu: The UUID of the one that this rank uses, empty without.
        cuda_aware: Whether MPI takes pointers to GPU memory.
        output_mb_per_s: Rate at which a small file was written and synchronised, where that was measured.
        data_mb_per_s: Rate at which samples were read.
    """

    host: str = "?"
    local_size: int = 1
    num_cpus: int = 1
    cores: list[int] = field(default_factory=list)
    cpu_quota: float | None = None
    threads: int = 1
    threads_set: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    num_gpus: int = 0
    gpu: str = ""
    cuda_aware: bool = False
    output_mb_per_s: float | None = None
    data_mb_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)


def check_launcher(environment: Mapping[str, str]) -> Finding:
    """What started this process, as far as its environment tells."""
    if "TORCHELASTIC_RUN_ID" in environment:
        remedy = "mpirun -n P .venv/bin/python train.py …"
        return Finding("launcher", "error", "torchrun, whose ranks MPI does not know", remedy)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return Finding("launcher", "ok", "Open MPI's mpirun")
    if "PMI_SIZE" in environment or "PMI_RANK" in environment:
        return Finding("launcher", "ok", "mpirun of the MPICH family, or srun with PMI")
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return Finding("launcher", "ok", "srun" + (" with PMIx" if "PMIX_RANK" in environment else ""))
    if "PMIX_RANK" in environment:
        return Finding("launcher", "ok", "a launcher with PMIx")
    return Finding("launcher", "ok", "none: plain python is one rank")


def check_size(size: int, environment: Mapping[str, str]) -> Finding:
    """MPI's number of ranks against the number that the launcher promised."""
    promise = launch.promised_size(environment)
    if promise is None:
        return Finding("world size", "ok", f"{size}")
    variable, expected = promise
    try:
        launch.check_world_size(size, environment)
    except InputError:
        found = f"the launcher promised {expected} ranks ({variable}={expected}), MPI sees {size}"
        remedy = (
            "use the mpirun of the MPI library that mpi4py loads (see MPI above); under Slurm prefer mpirun, or "
            f"srun --mpi=pmix; if {size} is what you want, set {launch.ALLOW_SIZE_VARIABLE}=1"
        )
        return Finding("world size", "error", found, remedy)
    if expected != size:
        found = f"{size}, although {variable}={expected}: {launch.ALLOW_SIZE_VARIABLE}=1 allows it"
        return Finding("world size", "note", found, f"unset {launch.ALLOW_SIZE_VARIABLE} unless that is meant")
    return Finding("world size", "ok", f"{size}, as promised by {variable}")


def launched(size: int, environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this job and MPI has all the ranks that it promised."""
    promise = launch.promised_size(environment)
    return promise is not None and promise[1] == size


def check_hosts(facts: Sequence[RankFacts]) -> list[Finding]:
    """How the ranks lie on the hosts; and whether MPI's idea of a host is that of the names."""
    by_host = ranks_by_host(facts)
    layout = ", ".join(f"{len(ranks)} on {host}" for host, ranks in by_host.items())
    found = f"{len(facts)} ranks: {layout}" if len(facts) > 1 else f"1 rank on {facts[0].host}"
    findings = []
    if len({len(ranks) for ranks in by_host.values()}) > 1:
        remedy = "mpirun --map-by ppr:N:node with N ranks on each host"
        findings.append(Finding("hosts", "note", f"{found}; the slowest host sets the pace", remedy))
    else:
        findings.append(Finding("hosts", "ok", found))
    for host, ranks in by_host.items():
        seen = sorted({facts[rank].local_size for rank in ranks})
        if seen != [len(ranks)]:
            found = f"{len(ranks)} ranks are on {host} by name, but MPI sees {' or '.join(map(str, seen))} together"
            remedy = (
                "give each host or container a name of its own (docker run --hostname), and let containers of one "
                "host share memory (--ipc=host); ranks choose GPUs by MPI's view"
            )
            findings.append(Finding("hosts", "warning", found, remedy, ranks=tuple(ranks)))
    return findings


def check_versions(facts: Sequence[RankFacts]) -> list[Finding]:
    """All ranks should run the same software."""
    findings = []
    for name in dict.fromkeys(name for rank_facts in facts for name in rank_facts.versions):
        versions = [rank_facts.versions.get(name, "unknown") for rank_facts in facts]
        if len(set(versions)) > 1:
            found = f"{name} differs between ranks: {', '.join(dict.fromkeys(versions))}"
            remedy = "one environment for all hosts: a shared file system, a container, or scripts/setup.sh on each"
            findings.append(Finding("versions", "error" if name == "kfac_dist" else "warning", found, remedy))
    return findings


def ranks_by_host(facts: Sequence[RankFacts]) -> dict[str, list[int]]:
    """Ranks of each host, hosts in the order of their first rank."""
    by_host: dict[str, list[int]] = {}
    for rank, rank_facts in enumerate(facts):
        by_host.setdefault(rank_facts.host, []).append(rank)
    return by_host

"""Rules on threads: each host's ranks against the cores that they may run on."""

import os
import re
from collections.abc import Mapping, Sequence

from kfac_dist.doctor.findings import Finding, Status, merge
from kfac_dist.doctor.ranks import RankFacts, ranks_by_host

_UNBIND = "mpirun --bind-to none (scripts/mpirun.sh does it)"


def check_threads(facts: Sequence[RankFacts]) -> list[Finding]:
    """Each host's ranks and threads against the cores that they may run on."""
    findings: list[list[Finding]] = [[] for _ in facts]
    for ranks in ranks_by_host(facts).values():
        mates = [facts[rank] for rank in ranks]
        for rank in ranks:
            findings[rank] = _threads_of_rank(facts[rank], mates)
    return merge(findings)  # hosts that look alike become one


def _threads_of_rank(own: RankFacts, mates: Sequence[RankFacts]) -> list[Finding]:
    """One rank among all on its host."""
    if not own.cores:
        return []  # could not be found out, which is a finding of its own
    num_ranks = len(mates)
    union = {core for mate in mates for core in mate.cores}
    total = sum(mate.threads for mate in mates)
    share = max(1, len(union) // num_ranks)
    have = f"{own.threads} {_plural(own.threads, 'thread')} a rank, {_describe_cores(own.cores)}"
    if len(own.cores) == 1 and own.num_cpus > 1:
        sharing = sum(mate.cores == own.cores for mate in mates)
        if sharing > 1:
            found = f"{sharing} ranks are bound to the same core, of {own.num_cpus}: they take turns"
            return [_threads("warning", found, f"{_UNBIND}; a container or batch job may also give one core only")]
        if own.num_cpus > num_ranks:
            found = f"bound to one core, of {own.num_cpus} for {num_ranks} {_plural(num_ranks, 'rank')}: threads starve"
            return [_threads("warning", found, f"{_UNBIND}, or --map-by ppr:{num_ranks}:node:PE=<cores a rank>")]
    findings = []
    if num_ranks > len(union):
        found = f"{num_ranks} ranks on {len(union)} {_plural(len(union), 'core')} of a host: they take turns"
        findings.append(_threads("warning", found, f"at most {len(union)} ranks a host (mpirun -n), or more cores"))
    elif own.threads > len(own.cores) or total > len(union):
        found = f"{have}; {total} threads on {len(union)} cores of the host"
        findings.append(_threads("warning", found, f"export OMP_NUM_THREADS={min(share, len(own.cores))}"))
    elif own.threads_set and 2 * total <= len(union):
        found = f"{have}; OMP_NUM_THREADS leaves {len(union) - total} of the host's {len(union)} cores idle"
        findings.append(_threads("note", found, f"unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={share}"))
    if own.cpu_quota is not None and total > own.cpu_quota:
        found = f"{total} threads in a container that may use {own.cpu_quota:g} cores' time"
        remedy = f"docker run --cpus, or export OMP_NUM_THREADS={max(1, int(own.cpu_quota) // num_ranks)}"
        findings.append(_threads("warning", found, remedy))
    return findings or [Finding("threads", "ok", f"{have}; {num_ranks} {_plural(num_ranks, 'rank')} on the host")]


def _threads(status: Status, found: str, remedy: str) -> Finding:
    return Finding("threads", status, found, remedy)


def _describe_cores(cores: Sequence[int]) -> str:
    return f"{len(cores)} {_plural(len(cores), 'core')} to run on"


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else noun + "s"


def cpu_quota(texts: Mapping[str, str]) -> float | None:
    """Cores' worth of time that a control group allows.

    Args:
        texts: Contents of `cpu.max` (version 2), or of `cpu.cfs_quota_us` and `cpu.cfs_period_us` (version 1), as far
            as there are such files.

    Returns:
        None where nothing is limited.
    """
    text = texts.get("cpu.max") or f"{texts.get('cpu.cfs_quota_us', '-1')} {texts.get('cpu.cfs_period_us', '0')}"
    matched = re.fullmatch(r"\s*([0-9]+)\s+([1-9][0-9]*)\s*", text)
    return int(matched[1]) / int(matched[2]) if matched else None


def read_cpu_quota() -> float | None:
    """This process's own; where a container shows its control group at the usual place."""
    texts = {}
    for path in (
        "/sys/fs/cgroup/cpu.max",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
    ):
        if os.path.isfile(path):
            with open(path, encoding="ascii") as file:
                texts[os.path.basename(path)] = file.read()
    return cpu_quota(texts)

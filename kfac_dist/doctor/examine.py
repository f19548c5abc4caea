"""Runs the checks on every rank, gathers what they found and compares the ranks.

No check branches on local data between collectives: a rank on which something breaks down reports that and goes on.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from kfac_dist.communicator import Communicator, is_cuda_aware, launch, library_version
from kfac_dist.doctor import files, gpus, network, ranks, software, threads
from kfac_dist.doctor.findings import Finding, Watchdog, attempt, in_order, merge
from kfac_dist.doctor.ranks import RankFacts

_ORDER = (
    *("Python", "packages", "DALI", "versions", "launcher", "MPI", "world size", "root", "hosts", "threads"),
    *("MPI collectives", "MPI latency", "MPI bandwidth", "ReduceScatterV"),
    *("GPUs", "GPU", "GPU memory", "GPU per rank", "CUDA-aware MPI", "NCCL"),
    *("output", "output space", "output speed", "output shared", "data", "data speed", "shared memory"),
    *("open files", "locked memory"),
)
_TELLING_BYTES = 1 << 20  # fewer say nothing about a rate


def examine(communicator: Communicator, output: Path, data: Path | None, watchdog: Watchdog) -> list[Finding]:
    """Check this machine and this job; collective, a few seconds.

    Args:
        communicator: The job's.
        output: Folder that runs shall be written to; need not exist.
        data: Folder that holds the data set, if that shall be looked at.
        watchdog: Ends the job if a check hangs.

    Returns:
        All ranks' findings, merged; the same on every rank.
    """
    findings, facts = _examine_rank(communicator, output, data, watchdog)
    watchdog.watch("waiting for the other ranks' findings")
    message = {"findings": [vars(finding) for finding in findings], "facts": facts.to_json()}
    gathered = [json.loads(text) for text in communicator.gather_bytes(json.dumps(message).encode())]
    by_rank = [[Finding(**fields | {"ranks": ()}) for fields in rank["findings"]] for rank in gathered]
    everyone = [RankFacts(**rank["facts"]) for rank in gathered]
    job_checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": lambda: ranks.check_versions(everyone),
        "hosts": lambda: ranks.check_hosts(everyone),
        "threads": lambda: threads.check_threads(everyone),
        "GPU per rank": lambda: gpus.check_gpus_of_all(everyone),
        "CUDA-aware MPI": lambda: gpus.check_cuda_aware(everyone),
        "output speed": lambda: files.check_speeds(everyone),
        "MPI collectives": lambda: network.measure_network(communicator, len(ranks.ranks_by_host(everyone))),
        "output shared": lambda: _look_for_marker(communicator, output),
    }
    merged = merge(by_rank)
    for name, check in job_checks.items():
        watchdog.findings = merged
        watchdog.watch(name)
        merged += attempt(name, check)
    watchdog.stop()
    return in_order(merged, _ORDER)


def _examine_rank(
    communicator: Communicator, output: Path, data: Path | None, watchdog: Watchdog
) -> tuple[list[Finding], RankFacts]:
    """What this rank finds by itself; nothing here may wait for another rank."""
    facts = RankFacts(socket.gethostname(), communicator.local_size)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "packages": lambda: _software(facts),
        "launcher": lambda: [ranks.check_launcher(os.environ)],
        "world size": lambda: [ranks.check_size(communicator.size, os.environ)],
        "MPI": partial(_mpi, communicator.size),
        "threads": lambda: _cores(facts),
        "GPUs": lambda: _gpus(facts, communicator),
        "output": lambda: _output(facts, output, communicator.local_rank == 0),
        "data": lambda: _data(facts, data),
        "shared memory": _shared_memory,
        "open files": software.limit_findings,
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        watchdog.findings = findings
        watchdog.watch(name)
        findings += attempt(name, check)
    return findings, facts


def _software(facts: RankFacts) -> list[Finding]:
    facts.versions = software.installed_versions()
    return software.software_findings()


def _mpi(size: int) -> list[Finding]:
    library = library_version()
    launched = ranks.launched(size, os.environ)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return [
        software.check_mpirun(library, maps, software.find_mpirun(), launched),
        *software.check_root(os.geteuid(), os.environ, library, launched),
    ]


def _cores(facts: RankFacts) -> list[Finding]:
    """Nothing to say alone: the rule needs all ranks of a host."""
    facts.num_cpus = os.cpu_count() or 1
    facts.cpu_quota = threads.read_cpu_quota()
    facts.threads = launch.set_threads_per_rank(facts.local_size)
    facts.threads_set = "OMP_NUM_THREADS" in os.environ
    facts.cores = sorted(os.sched_getaffinity(0))
    return []


def _gpus(facts: RankFacts, communicator: Communicator) -> list[Finding]:
    facts.num_gpus, complaint = gpus.count_gpus()
    interfaces = os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else []
    docker = os.path.exists("/.dockerenv")
    findings = [
        gpus.check_driver(facts.num_gpus, gpus.driver_is_there(), torch.version.cuda, os.environ, complaint),
        gpus.check_nccl(gpus.nccl_version(), facts.num_gpus, os.environ, sorted(interfaces), docker),
    ]
    facts.cuda_aware = is_cuda_aware()
    if facts.num_gpus:
        gpu = gpus.read_gpu(facts.num_gpus, communicator.local_rank, communicator.local_size)
        findings += gpus.check_gpu(gpu, torch.cuda.get_arch_list())
        facts.gpu = gpus.read_uuid(gpu)
    return findings


def _output(facts: RankFacts, output: Path, measures: bool) -> list[Finding]:
    """Every rank writes; one of each host writes enough to measure."""
    folder = files.existing_part(output)
    try:
        rate = files.write_small_file(folder, *(() if measures else (1,)))
    except OSError as error:
        return [files.not_writable(output, error)]
    if measures:
        facts.output_mb_per_s = rate
    room = os.statvfs(folder)
    return [files.check_output_kind(output, _mount(folder)), files.check_space(output, room.f_bavail * room.f_frsize)]


def _data(facts: RankFacts, data: Path | None) -> list[Finding]:
    if data is None:
        return [Finding("data", "ok", "not looked at: --data DIR does")]
    try:
        num_bytes, rate = files.read_samples(data)
    except OSError as error:
        return [files.not_readable(data, error)]
    if num_bytes >= _TELLING_BYTES:
        facts.data_mb_per_s = rate
    return [files.check_data(data, num_bytes, _mount(data))]


def _shared_memory() -> list[Finding]:
    if not os.path.isdir("/dev/shm"):
        return [files.check_shared_memory(None, 0)]
    room = os.statvfs("/dev/shm")
    return [files.check_shared_memory(room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize)]


def _mount(path: Path) -> files.Mount | None:
    return files.find_mount(str(path.resolve()), Path("/proc/mounts").read_text(encoding="utf-8"))


def _look_for_marker(communicator: Communicator, output: Path) -> list[Finding]:
    """Rank 0 writes a file, all look for it; collective, and no rank leaves early."""
    marker = ""
    if communicator.is_main:
        try:
            marker = files.make_marker(files.existing_part(output))
        except OSError:
            marker = ""  # `_output` has said so
    marker = os.fsdecode(communicator.gather_bytes(os.fsencode(marker))[0])
    seen = communicator.gather_bytes(b"1" if marker and files.wait_for_marker(marker) else b"0")
    if communicator.is_main and marker:
        os.unlink(marker)
    return files.check_marker(marker, [answer == b"1" for answer in seen])

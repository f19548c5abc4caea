"""Runs the checks on every rank, gathers what they found and compares the ranks.

No check branches on local data between collectives: a rank on which something breaks down reports that and goes on.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from kfac_dist.communicator import Communicator, is_cuda_aware, launch, library_version
from kfac_dist.communicator.abort import running_mpi
from kfac_dist.communicator.devices import RankDevice, choose_device, describe_device
from kfac_dist.doctor import machine, ranks, software
from kfac_dist.doctor.findings import Finding, HangGuard, attempt, merge
from kfac_dist.doctor.ranks import RankFacts

_Checks = Mapping[str, Callable[[], Iterable[Finding]]]


def examine(communicator: Communicator, output: Path, data: Path | None, guard: HangGuard) -> list[Finding]:
    """Check this machine and this job; collective, a few seconds.

    Args:
        communicator: The job's.
        output: Folder that runs will be written to; need not exist.
        data: Folder that holds the data set; None if it is not to be looked at.
        guard: Ends the job if a check hangs.

    Returns:
        All ranks' findings, merged; the same on every rank.
    """
    facts = RankFacts(
        RankDevice(socket.gethostname(), "cpu"),
        software.installed_versions() | {"MPI": " ".join(software.mpi_identity(library_version()))},
        launch.set_threads_per_rank(communicator.local_size),
        threads_set="OMP_NUM_THREADS" in os.environ,
        cores=sorted(os.sched_getaffinity(0)),
        num_cpus=os.cpu_count() or 1,
    )
    _run(_checks_of_rank(facts, communicator, output, data), guard)
    guard.stage = "waiting for the other ranks' findings"
    message = {"findings": [asdict(finding) for finding in guard.findings], "facts": asdict(facts)}
    gathered = [json.loads(text) for text in communicator.gather_bytes(json.dumps(message).encode())]
    guard.findings = merge([[Finding(**fields | {"ranks": ()}) for fields in rank["findings"]] for rank in gathered])
    everyone = [RankFacts(**rank["facts"] | {"device": RankDevice(**rank["facts"]["device"])}) for rank in gathered]
    checks_of_job: _Checks = {
        "versions": lambda: ranks.check_versions(everyone),
        "hosts": lambda: [ranks.check_hosts(everyone)],
        "threads": lambda: ranks.check_threads(everyone),
        "GPU per rank": lambda: machine.check_gpu_per_rank([rank_facts.device for rank_facts in everyone]),
        "network": lambda: ranks.measure_network(communicator, len(ranks.ranks_by_host(everyone))),
    }
    _run(checks_of_job, guard)
    guard.timer.cancel()
    return guard.findings


def _run(checks: _Checks, guard: HangGuard) -> None:
    for name, check in checks.items():
        guard.stage = name
        guard.findings += attempt(name, check)


def _checks_of_rank(facts: RankFacts, communicator: Communicator, output: Path, data: Path | None) -> _Checks:
    """What a rank looks at by itself, filling in its facts; none of these may wait for another rank."""
    return {
        "software": software.software_findings,
        "launcher": lambda: [ranks.check_launcher(os.environ)],
        "world size": lambda: [ranks.check_size(communicator.size, os.environ)],
        "MPI": lambda: [_mpi(communicator.size)],
        "GPUs": lambda: _gpus(facts, communicator.local_rank),
        "output": lambda: [machine.check_output(output)],
        "data": lambda: [machine.check_data(data)] if data else [],
    }


def _mpi(size: int) -> Finding:
    promise = launch.promised_size(os.environ)
    if promise is not None and promise[1] == size:  # launched by the right mpirun, whatever else is on PATH
        return Finding("MPI", "ok", library_version())
    return software.check_mpirun(library_version(), software.find_mpirun())


def _gpus(facts: RankFacts, local_rank: int) -> list[Finding]:
    device = choose_device("auto", local_rank)
    facts.device = describe_device(device)
    num_gpus, visible = facts.device.num_visible, os.environ.get("CUDA_VISIBLE_DEVICES")
    findings = [machine.check_visible(num_gpus, machine.has_driver(), torch.version.cuda, visible)]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        interfaces = sorted(name for _, name in socket.if_nameindex())
        findings += [
            machine.check_gpu(facts.device.model, capability, machine.try_gpu(device)),
            machine.check_nccl(machine.nccl_version(), os.environ, interfaces, os.path.exists("/.dockerenv")),
        ]
        if running_mpi() is not None:  # torchrun's ranks need none
            findings.append(machine.check_cuda_aware(is_cuda_aware()))
    return findings

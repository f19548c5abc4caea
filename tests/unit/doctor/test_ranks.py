"""The doctor's rules on ranks, threads and the network, given made-up facts."""

from typing import Any

import pytest

from kfac_dist.communicator.devices import RankDevice
from kfac_dist.doctor import ranks
from kfac_dist.doctor.findings import Status
from kfac_dist.doctor.ranks import RankFacts


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "plain python"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "Open MPI's mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPICH family"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "PMIX_RANK": "1"}, "with PMIx"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "srun"),
    ],
)
def test_launcher(environment: dict[str, str], words: str) -> None:
    finding = ranks.check_launcher(environment)
    assert finding.status == "ok"
    assert words in finding.found
    torchrun = ranks.check_launcher(environment | {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"})
    assert torchrun.found.startswith("torchrun; ")


@pytest.mark.parametrize(
    ("size", "environment", "status"),
    [
        (1, {}, "ok"),
        (2, {"OMPI_COMM_WORLD_SIZE": "2"}, "ok"),
        (1, {"OMPI_COMM_WORLD_SIZE": "4"}, "error"),
        (1, {"SLURM_STEP_NUM_TASKS": "4"}, "error"),
        (1, {"SLURM_STEP_NUM_TASKS": "4", "KFAC_DIST_ALLOW_SIZE_MISMATCH": "1"}, "note"),
        (4, {"SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4"}, "ok"),
    ],
)
def test_world_size(size: int, environment: dict[str, str], status: Status) -> None:
    finding = ranks.check_size(size, environment)
    assert finding.status == status


def job(*hosts: str, **shared: Any) -> list[RankFacts]:
    return [RankFacts(RankDevice(host, "cpu"), **shared) for host in hosts]


def test_hosts() -> None:
    finding = ranks.check_hosts(job("a", "a", "b", "b"))
    assert (finding.status, finding.found) == ("ok", "4 ranks: 2 on a, 2 on b")
    finding = ranks.check_hosts(job("a", "a", "b"))
    assert (finding.status, "ppr:N:node" in finding.remedy) == ("note", True)


def test_versions_agree() -> None:
    facts = job("a", "b")
    facts[0].versions = {"torch": "2.9", "kfac_dist": "0.1"}
    facts[1].versions = {"torch": "2.9", "kfac_dist": "0.1"}
    assert ranks.check_versions(facts) == []
    facts[1].versions = {"torch": "2.10", "kfac_dist": "0.2", "nvidia-dali-cuda130": "2.0"}
    assert [(f.status, f.found) for f in ranks.check_versions(facts)] == [
        ("warning", "torch differs between ranks: 2.9, 2.10"),
        ("error", "kfac_dist differs between ranks: 0.1, 0.2"),
        ("warning", "nvidia-dali-cuda130 differs between ranks: none, 2.0"),
    ]


@pytest.mark.parametrize(
    ("cores", "num_threads", "facts", "status", "words", "remedy"),
    [
        ([[0, 1], [0, 1]], 1, {}, "ok", "1 per rank, 2 of the host's 8 cores", ""),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 2, {}, "ok", "2 per rank", ""),
        ([[0], [0]], 1, {}, "warning", "more cores than ranks (2): threads starve", "--bind-to none"),
        ([[0], [1]], 1, {}, "warning", "more cores than ranks (2): threads starve", "--bind-to none"),
        ([[0], [0]], 1, {"num_cpus": 2}, "warning", "2 threads of 2 ranks on 1 cores", "--bind-to none"),
        ([[0], [1]], 1, {"num_cpus": 2}, "ok", "1 of the host's 2 cores to run on", ""),
        ([[0, 1]] * 4, 1, {}, "warning", "4 threads of 4 ranks on 2 cores", "at most 2 ranks per host"),
        ([[0, 1]] * 2, 2, {}, "warning", "4 threads of 2 ranks on 2 cores", "OMP_NUM_THREADS=1"),
        ([[0, 1, 2, 3]] * 2, 4, {}, "warning", "8 threads of 2 ranks on 4 cores", "OMP_NUM_THREADS=2"),
        ([[0, 1], [2, 3]], 3, {}, "warning", "6 threads of 2 ranks on 4 cores", "OMP_NUM_THREADS=2"),
        ([list(range(16))] * 2, 1, {"threads_set": True}, "note", "leaves 14 of 16 cores idle", "OMP_NUM_THREADS=8"),
        ([list(range(16))] * 2, 1, {}, "ok", "1 per rank", ""),
    ],
)
def test_threads(
    cores: list[list[int]], num_threads: int, facts: dict[str, Any], status: Status, words: str, remedy: str
) -> None:
    shared = {"num_cpus": 8, "threads": num_threads} | facts
    everyone = job(*["a"] * len(cores), *["b"] * len(cores), **shared)  # two hosts alike are said once
    for own, facts_of_rank in zip(cores + cores, everyone, strict=True):
        facts_of_rank.cores = own
    (finding,) = ranks.check_threads(everyone)
    assert (finding.status, finding.ranks) == (status, ())
    assert words in finding.found
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("hosts", "num_threads", "cores", "expected"),
    [
        ("ab", (2, 1), ([0, 1, 2, 3], [0]), [("ok", (0,)), ("warning", (1,))]),
        ("aa", (3, 3), ([0, 1], [2, 3, 4, 5]), [("warning", (0,)), ("ok", (1,))]),
    ],
)
def test_only_those_in_trouble_are_named(hosts: str, num_threads: Any, cores: Any, expected: Any) -> None:
    everyone = job(*hosts, num_cpus=8)
    for own, own_threads, own_cores in zip(everyone, num_threads, cores, strict=True):
        own.threads, own.cores = own_threads, own_cores
    assert [(finding.status, finding.ranks) for finding in ranks.check_threads(everyone)] == expected


@pytest.mark.parametrize(
    ("latency_seconds", "bytes_per_second", "num_hosts", "status"),
    [
        (5e-6, 5e9, 4, "ok"),
        (5e-3, 5e9, 1, "note"),
        (5e-3, 5e9, 4, "note"),
        (5e-6, 5e7, 1, "ok"),
        (5e-6, 5e7, 2, "warning"),
    ],
)
def test_speed_of_the_network(latency_seconds: float, bytes_per_second: float, num_hosts: int, status: Status) -> None:
    finding = ranks.check_network(latency_seconds, bytes_per_second, num_hosts)
    assert finding.status == status
    assert status == "ok" or ("btl_tcp_if_include" in finding.remedy) == (num_hosts > 1)

"""The doctor's rules on ranks, threads and the network, given made-up facts."""

from collections.abc import Callable
from typing import Any

import pytest

from kfac_dist.doctor import network, ranks, software, threads
from kfac_dist.doctor.findings import Finding, Status
from kfac_dist.doctor.ranks import RankFacts


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "plain python"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "Open MPI's mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPICH family"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "PMIX_RANK": "1"}, "srun with PMIx"),
        ({"PMIX_RANK": "1"}, "with PMIx"),
    ],
)
def test_launcher(environment: dict[str, str], words: str) -> None:
    finding = ranks.check_launcher(environment)
    assert finding.status == "ok"
    assert words in finding.found


def test_torchrun_is_no_launcher() -> None:
    finding = ranks.check_launcher({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"})
    assert finding.status == "error"
    assert finding.remedy.startswith("mpirun")


@pytest.mark.parametrize(
    ("size", "environment", "status"),
    [
        (1, {}, "ok"),
        (2, {"OMPI_COMM_WORLD_SIZE": "2"}, "ok"),
        (1, {"OMPI_COMM_WORLD_SIZE": "4"}, "error"),
        (1, {"SLURM_NTASKS": "4"}, "error"),
        (1, {"SLURM_NTASKS": "4", "KFAC_DIST_ALLOW_SIZE_MISMATCH": "1"}, "note"),
        (4, {"SLURM_NTASKS": "2", "PMI_SIZE": "4"}, "ok"),
    ],
)
def test_world_size(size: int, environment: dict[str, str], status: Status) -> None:
    finding = ranks.check_size(size, environment)
    assert finding.status == status
    if status == "error":
        assert "promised 4 ranks" in finding.found
        assert "MPI sees 1" in finding.found
        assert "set KFAC_DIST_ALLOW_SIZE_MISMATCH=1" in finding.remedy


def test_rank_of_the_launcher() -> None:
    assert software.launcher_rank({}) == 0
    assert software.launcher_rank({"SLURM_PROCID": "3"}) == 3
    assert software.launcher_rank({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "5"}) == 5


def job(*hosts: str, **shared: Any) -> list[RankFacts]:
    return [RankFacts(host, **{"local_size": hosts.count(host)} | shared) for host in hosts]


def test_hosts() -> None:
    (finding,) = ranks.check_hosts(job("a", "a", "b", "b"))
    assert (finding.status, finding.found) == ("ok", "4 ranks: 2 on a, 2 on b")
    (finding,) = ranks.check_hosts(job("a", "a", "b"))
    assert (finding.status, "ppr:N:node" in finding.remedy) == ("note", True)
    found = ranks.check_hosts(job("a", "a", "b", "b", local_size=1))  # containers that share no memory
    assert [(finding.status, finding.ranks) for finding in found] == [
        ("ok", ()),
        ("warning", (0, 1)),
        ("warning", (2, 3)),
    ]


def test_versions_agree() -> None:
    facts = job("a", "b")
    facts[0].versions = {"torch": "2.9", "kfac_dist": "0.1"}
    facts[1].versions = {"torch": "2.9", "kfac_dist": "0.1"}
    assert ranks.check_versions(facts) == []
    facts[1].versions = {"torch": "2.10", "kfac_dist": "0.2"}
    assert [(f.status, f.found) for f in ranks.check_versions(facts)] == [
        ("warning", "torch differs between ranks: 2.9, 2.10"),
        ("error", "kfac_dist differs between ranks: 0.1, 0.2"),
    ]


@pytest.mark.parametrize(
    ("cores", "num_threads", "facts", "status", "words"),
    [
        ([[0, 1], [0, 1]], 1, {}, "ok", "2 ranks on the host"),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 2, {}, "ok", "2 threads a rank"),
        ([[0], [0]], 1, {}, "warning", "2 ranks are bound to the same core, of 8: they take turns"),
        ([[0], [1]], 1, {}, "warning", "bound to one core, of 8 for 2 ranks: threads starve"),
        ([[0], [1]], 1, {"num_cpus": 2}, "ok", "1 core to run on"),
        ([[0]], 1, {"num_cpus": 1}, "ok", "1 core to run on"),
        ([[0, 1]] * 4, 1, {}, "warning", "4 ranks on 2 cores of a host: they take turns"),
        ([[0, 1]] * 2, 2, {}, "warning", "4 threads on 2 cores of the host"),
        ([[0, 1], [2, 3]], 3, {}, "warning", "6 threads on 4 cores of the host"),
        ([list(range(16))] * 2, 1, {"threads_set": True}, "note", "leaves 14 of the host's 16 cores idle"),
        ([list(range(16))] * 2, 1, {}, "ok", "1 thread a rank"),
        ([list(range(16))] * 2, 8, {"cpu_quota": 4.0}, "warning", "may use 4 cores' time"),
    ],
)
def test_threads(cores: list[list[int]], num_threads: int, facts: dict[str, Any], status: Status, words: str) -> None:
    shared = {"num_cpus": 8, "threads": num_threads} | facts
    everyone = job(*["a"] * len(cores), *["b"] * len(cores), **shared)  # two hosts alike are said once
    for own, facts_of_rank in zip(cores + cores, everyone, strict=True):
        facts_of_rank.cores = own
    (finding,) = threads.check_threads(everyone)
    assert (finding.status, finding.ranks) == (status, ())
    assert words in finding.found


@pytest.mark.parametrize(
    ("cores", "num_threads", "remedy"),
    [
        ([[0], [0]], 1, "--bind-to none"),
        ([[0, 1, 2, 3]] * 2, 4, "OMP_NUM_THREADS=2"),
        ([[0, 1]] * 4, 1, "at most 2 ranks a host"),
    ],
)
def test_remedies_of_threads(cores: list[list[int]], num_threads: int, remedy: str) -> None:
    everyone = job(*["a"] * len(cores), num_cpus=8, threads=num_threads)
    for own, facts_of_rank in zip(cores, everyone, strict=True):
        facts_of_rank.cores = own
    (finding,) = threads.check_threads(everyone)
    assert remedy in finding.remedy


def test_only_the_host_in_trouble_is_named() -> None:
    everyone = job("a", "b", num_cpus=4, threads=2, cores=[0, 1, 2, 3])
    everyone[1].cores = [0]
    everyone[1].threads = 1
    assert [(finding.status, finding.ranks) for finding in threads.check_threads(everyone)] == [
        ("ok", (0,)),
        ("warning", (1,)),
    ]


@pytest.mark.parametrize(
    ("texts", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.cfs_quota_us": "-1"}, None),
    ],
)
def test_cpu_quota(texts: dict[str, str], quota: float | None) -> None:
    assert threads.cpu_quota(texts) == quota


# Network


def test_sum() -> None:
    assert network.check_sum(3.0, 3.0).status == "ok"
    assert network.check_sum(2.0, 3.0).status == "error"


@pytest.mark.parametrize(
    ("check", "value", "num_hosts", "status"),
    [
        (network.check_latency, 5e-6, 4, "ok"),
        (network.check_latency, 5e-3, 1, "note"),
        (network.check_latency, 5e-3, 4, "note"),
        (network.check_bandwidth, 50e6, 1, "ok"),
        (network.check_bandwidth, 50e6, 2, "warning"),
        (network.check_bandwidth, 500e6, 2, "note"),
        (network.check_bandwidth, 5e9, 2, "ok"),
    ],
)
def test_speed_of_the_network(
    check: Callable[[float, int], Finding], value: float, num_hosts: int, status: Status
) -> None:
    finding = check(value, num_hosts)
    assert finding.status == status
    assert status == "ok" or ("btl_tcp_if_include" in finding.remedy) == (num_hosts > 1)


def test_reduce_scatter_is_listed_fastest_first() -> None:
    finding = network.describe_reduce_scatter({"native": 0.04, "reduce": 0.012, "ireduce": 0.013})
    assert finding.found == "fastest first: reduce 12.0 ms, ireduce 13.0 ms, native 40.0 ms"

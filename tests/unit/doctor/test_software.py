"""The doctor's rules on packages, MPI and limits, given made-up facts."""

import pytest

from kfac_dist.doctor import software
from kfac_dist.doctor.findings import Finding, Status
from tests.paths import ROOT

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11 (mpi4py 4.1.2)"
MPIRUN = ("/usr/bin/mpirun", "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/", True)
HYDRA = ("/opt/mpich/bin/mpirun", "HYDRA build details:\n    Version:           4.2.0\n", True)


def statuses(found: list[Finding]) -> list[Status]:
    return [finding.status for finding in found]


@pytest.mark.parametrize(
    ("version", "required", "status"),
    [("3.11.0", ">=3.11", "ok"), ("3.10.14", ">=3.11", "error"), ("3.14.0rc1", ">=3.11", "ok"), ("3.9.1", "", "ok")],
)
def test_python(version: str, required: str, status: Status) -> None:
    assert software.check_python(version, required).status == status


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"torch": "2.14.0+cu130", "PyYAML": "6"}, ["torch 2.14.0+cu130, pyyaml 6"]),
        ({"torch": "2.9", "PyYAML": "6.0.0"}, ["torch 2.9, pyyaml 6.0.0"]),
        ({"torch": "2.8.1", "PyYAML": "6.0"}, ["torch 2.8.1 is too old, needs >= 2.9"]),
        ({"torch": "1.13"}, ["torch 1.13 is too old, needs >= 2.9", "pyyaml is missing, needs >= 6"]),
    ],
)
def test_packages(installed: dict[str, str], expected: list[str]) -> None:
    requirements = ["torch>=2.9", "pyyaml>=6", 'ruff>=0.11; extra == "dev"']
    found = software.check_packages(requirements, installed)
    assert [finding.found for finding in found] == expected
    assert all((finding.status == "ok") == ("needs" not in finding.found) for finding in found)
    assert "pip install 'torch>=2.9'" in found[0].remedy or found[0].status == "ok"


def test_the_minima_are_those_of_setup_py() -> None:
    """An installation that is older than setup.py would be compared with other numbers."""
    asked = (ROOT / "setup.py").read_text(encoding="utf-8")
    named = [finding.found for finding in software.software_findings() if finding.name == "packages"]
    for name in ("torch", "mpi4py", "numpy"):
        assert f'"{name}>=' in asked
        assert name in " ".join(named)


def test_dali_is_optional() -> None:
    assert software.check_dali({"torch": "2.9"}).status == "note"
    assert software.check_dali({"nvidia-dali-cuda120": "1.50"}).status == "ok"


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        (OPEN_MPI, ("Open MPI", "5.0.11")),
        (MPIRUN[1], ("Open MPI", "5.0.11")),
        ("MPICH Version:      4.2.0", ("MPICH", "4.2.0")),
        (HYDRA[1], ("MPICH", "4.2.0")),
        ("Intel(R) MPI Library 2021.11 for Linux* OS", ("MPICH", "2021.11")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", ("MPICH", "2021.11")),
        ("Spectrum", ("", "")),
    ],
)
def test_what_an_mpi_says_of_itself(text: str, identity: tuple[str, str]) -> None:
    assert software.mpi_identity(text) == identity


@pytest.mark.parametrize(
    ("library", "mpirun", "works", "status", "words"),
    [
        (OPEN_MPI, MPIRUN, False, "ok", "mpirun is the same version (/usr/bin/mpirun)"),
        (OPEN_MPI, (*MPIRUN[:2], False), True, "ok", "not on PATH: scripts/mpirun.sh finds it"),
        (OPEN_MPI, HYDRA, False, "error", "/opt/mpich/bin/mpirun is MPICH 4.2.0"),
        (OPEN_MPI, HYDRA, True, "note", "/opt/mpich/bin/mpirun is MPICH 4.2.0"),
        (OPEN_MPI.replace("5.0.11", "4.1.6"), MPIRUN, False, "warning", "is Open MPI 5.0.11"),
        ("MPICH Version:      4.1.2", HYDRA, False, "ok", "mpirun is the same"),  # one wire protocol for all
        (OPEN_MPI, None, False, "error", "no mpirun on PATH"),
        (OPEN_MPI, None, True, "note", "no mpirun on PATH"),
        (OPEN_MPI, ("/bin/mpirun", "", True), False, "note", "does not tell what it is"),
    ],
)
def test_mpirun_belongs_to_the_library(
    library: str, mpirun: tuple[str, str, bool] | None, works: bool, status: Status, words: str
) -> None:
    maps = "7f00-7f01 r-xp 0 fe:00 1    /opt/lib/libmpi.so.40.40.7\n7f02 r-xp 0 fe:00 1    /opt/lib/libmpi.so.40.40.7\n"
    finding = software.check_mpirun(library, maps, mpirun, works)
    assert finding.status == status
    assert words in finding.found
    assert finding.found.count("/opt/lib/libmpi.so.40.40.7") == 1


def test_root() -> None:
    both = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert software.check_root(1000, {}, OPEN_MPI, False) == []
    assert software.check_root(0, {}, "MPICH Version: 4.2", False) == []
    assert statuses(software.check_root(0, both, OPEN_MPI, False)) == ["ok"]
    (finding,) = software.check_root(0, {"OMPI_ALLOW_RUN_AS_ROOT": "1"}, OPEN_MPI, False)
    assert (finding.status, "without OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:" in finding.found) == ("note", True)
    assert statuses(software.check_root(0, {}, OPEN_MPI, True)) == ["ok"]  # mpirun --allow-run-as-root


@pytest.mark.parametrize(("limit", "status"), [(-1, "ok"), (65536, "ok"), (1024, "note"), (256, "warning")])
def test_open_files(limit: int, status: Status) -> None:
    assert software.check_open_files(limit).status == status


@pytest.mark.parametrize(
    ("limit", "devices", "status"),
    [(-1, ["mlx5_0"], "ok"), (8 << 20, [], "ok"), (8 << 20, ["mlx5_0"], "note")],
)
def test_locked_memory(limit: int, devices: list[str], status: Status) -> None:
    finding = software.check_locked_memory(limit, devices)
    assert finding.status == status
    assert status == "ok" or ("mlx5_0" in finding.found and "ulimit -l unlimited" in finding.remedy)

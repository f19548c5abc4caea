"""The doctor's rules on software, given made-up facts."""

import pytest

from kfac_dist.doctor import software
from kfac_dist.doctor.findings import Status

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11 (mpi4py 4.1.2)"
INTEL = "Intel(R) MPI Library 2021.11 for Linux* OS"
MPIRUN = ("/usr/bin/mpirun", "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/")
HYDRA = ("/opt/mpich/bin/mpirun", "HYDRA build details:\n    Version:           4.2.0\n")


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"Python", "kfac_dist", "torch", "mpi4py", "numpy"} <= set(software.installed_versions())
    monkeypatch.setattr(software, "installed_versions", lambda: {"Python": "3.11.7", "torch": "2.9"})
    assert [finding.status for finding in software.software_findings()] == ["ok", "note"]
    assert software.software_findings()[0].found.startswith("Python 3.11.7, torch 2.9 (")
    monkeypatch.setattr(software, "installed_versions", lambda: {"nvidia-dali-cuda120": "1.50"})
    assert [finding.status for finding in software.software_findings()] == ["ok"]


def test_rank_of_the_launcher() -> None:
    assert software.launcher_rank({}) == 0
    assert software.launcher_rank({"SLURM_PROCID": "3"}) == 3
    assert software.launcher_rank({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "5"}) == 5
    assert software.launcher_rank({"SLURM_PROCID": "0", "RANK": "5"}) == 0
    assert software.launcher_rank({"SLURM_PROCID": "0", "RANK": "5", "TORCHELASTIC_RUN_ID": "none"}) == 5


@pytest.mark.parametrize(
    ("library", "mpirun", "status", "words"),
    [
        (OPEN_MPI, MPIRUN, "ok", "Open MPI 5.0.11; mpirun is the same version (/usr/bin/mpirun)"),
        (OPEN_MPI, HYDRA, "error", "/opt/mpich/bin/mpirun is MPICH 4.2.0"),
        (OPEN_MPI.replace("5.0.11", "4.1.6"), MPIRUN, "warning", "is Open MPI 5.0.11"),
        ("MPICH Version:      4.1.2", HYDRA, "ok", "MPICH 4.1.2; mpirun is the same"),  # one wire protocol for all
        (INTEL, ("mpirun", INTEL.replace("Library", "Library for Linux* OS, Version")), "ok", "MPICH 2021.11; "),
        (OPEN_MPI, None, "error", "no mpirun on PATH"),
        (OPEN_MPI, ("/bin/mpirun", ""), "note", "does not tell what it is"),
    ],
)
def test_mpirun(library: str, mpirun: tuple[str, str] | None, status: Status, words: str) -> None:
    finding = software.check_mpirun(library, mpirun)
    assert finding.status == status
    assert words in finding.found

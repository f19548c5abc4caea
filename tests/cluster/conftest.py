"""The cluster that the tests submit to, and interpreters that stand in for Python."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.paths import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm on two nodes, both this host."""
    absent = missing()
    if absent:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not found; scripts/setup_cluster_tests.sh installs it")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
    except TimeoutError as error:
        started.stop()
        pytest.skip(f"Slurm does not start here: {error}; {started.logs()}")
    yield started
    started.cancel_all()
    started.stop()


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], str]:
    """``stand_in("exit 3")`` is an interpreter that does these lines of shell, for KFAC_DIST_PYTHON."""

    def write(lines: str) -> str:
        path = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def patient(stand_in: Callable[[str], str]) -> str:
    """Python that waits for a signal before the iteration that the variable WAIT_AT names."""
    program = ROOT / "tests/cluster/programs/patient.py"
    return stand_in(f'exec "{sys.executable}" "{program}" "$@"')

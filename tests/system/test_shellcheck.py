"""ShellCheck has nothing to say about any script of this project."""

import shutil
import subprocess

import pytest

from tests.paths import ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".ci", "scripts", "docker", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci/run"
)


def test_all_are_looked_at() -> None:
    assert {".ci/run", "scripts/mpirun.sh", "scripts/slurm/common.sh", "scripts/slurm/train.sbatch"} <= set(SCRIPTS)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    found = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr

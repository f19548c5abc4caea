"""The README's example is a file that runs, and the files and commands that it names exist."""

import re
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples/own_script.py"


def test_the_readme_shows_the_example_as_it_stands() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown == EXAMPLE.read_text(encoding="utf-8")
    assert shown.count("\n") < 40


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_example_learns_digits(num_ranks: int, mpirun: Callable[..., CompletedProcess[str]]) -> None:
    finished = mpirun(num_ranks, [EXAMPLE], env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    (accuracy,) = re.findall(r"accuracy on rank 0's share: ([\d.]+) %", finished.stdout)
    assert float(accuracy) > 97


def test_what_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:kfac_dist|configs|scripts|docs|benchmarks|examples|tests)/[\w./-]*)`", README))
    named |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

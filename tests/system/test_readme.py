"""The README's example runs as it stands, and the files and commands that it names exist."""

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_optimizer_example_learns_digits_on_two_ranks(
    mpirun: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count("\n") < 40
    script = tmp_path / "script.py"
    script.write_text(example, encoding="utf-8")
    finished = mpirun(2, [script], env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    (accuracy,) = re.findall(r"accuracy on rank 0's share: ([\d.]+) %", finished.stdout)
    assert float(accuracy) > 97


def test_what_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:kfac_dist|configs|scripts|docs|benchmarks|tests)/[\w./-]*)`", README))
    named |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

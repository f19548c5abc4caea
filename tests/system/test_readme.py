"""The README's example is a file that runs, and the files and commands that it names exist."""

import re
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

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


def train_commands() -> list[list[str]]:
    """Words behind `train.py` of every command that the README shows, and the ranks it is started on as --ranks."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            before, found, after = line.partition(".venv/bin/python train.py ")
            if found:
                started = re.fullmatch(r"scripts/mpirun\.sh -n (\d+) ", before)
                assert started or not before, f"{line}: an mpirun that lacks what scripts/mpirun.sh adds"
                words = after.partition(" #")[0].split()
                commands.append(words + (["--explain", "--ranks", started[1]] if started else []))
    return commands


@pytest.mark.parametrize("words", train_commands(), ids=" ".join)
def test_the_readmes_commands_fit_their_recipes(words: list[str], command: Callable[..., Any]) -> None:
    """Planned instead of run: recipe, overrides and the number of ranks go together."""
    finished = command(ROOT / words[0], *words[1:])
    assert finished.code == 0, finished.err
    assert len(train_commands()) >= 3


def test_an_explained_number_of_ranks_that_does_not_fit_names_one_that_does(command: Callable[..., Any]) -> None:
    recipe = ROOT / "configs/cifar10/kfac_resnet20.yaml"
    refused = command(recipe, "--explain", "--ranks", "64")
    assert refused.code == 2
    (ranks,) = re.findall(r"numbers of ranks that work with 512: (\d+)", refused.err)
    assert command(recipe, "--explain", "--ranks", ranks).code == 0


def test_what_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:kfac_dist|configs|scripts|docs|benchmarks|examples|tests)/[\w./-]*)`", README))
    named |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

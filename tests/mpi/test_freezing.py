"""Parameters frozen and unfrozen in mid-training, and models in bf16: ranks stay equal, and equal one rank."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.mpi

RunProgram = Callable[..., CompletedProcess[str]]

# Relative difference of all weights. bf16 rounds to 2^-8, and differently where one rank adds two slots' gradients.
TOLERANCES = {"kfac-fp64": 1e-12, "sgd-fp64": 1e-12, "kfac-bf16": 3e-2, "sgd-bf16": 1e-2}


def train(run_program: RunProgram, num_ranks: int, folder: Path) -> dict[str, Tensor]:
    """All weights of each case, in one vector."""
    folder.mkdir()
    # The program itself compares the ranks and looks at what moves.
    finished = run_program(num_ranks, "freezing.py", folder, *TOLERANCES)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    states = {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in TOLERANCES}
    return {case: torch.cat([weight.flatten() for weight in state.values()]) for case, state in states.items()}


@pytest.fixture(scope="module")
def one_rank(run_program: RunProgram, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(run_program, 1, tmp_path_factory.mktemp("freezing") / "1")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one_rank(
    num_ranks: int, one_rank: dict[str, Tensor], run_program: RunProgram, tmp_path: Path
) -> None:
    for case, weights in train(run_program, num_ranks, tmp_path / "ranks").items():
        difference = float((weights - one_rank[case]).norm() / one_rank[case].norm())
        print(f"{case}: {difference:.1e}")
        assert difference < TOLERANCES[case], f"{case}: {difference:.1e}"


def test_cases_differ(one_rank: dict[str, Tensor]) -> None:
    """Agreement proves nothing if the optimizers hardly move the weights."""
    difference = (one_rank["kfac-fp64"] - one_rank["sgd-fp64"]).norm() / one_rank["sgd-fp64"].norm()
    assert difference > 0.1, f"{difference:.1e}"

"""Whatever users do between steps, and in whatever order, any number of ranks does the same as one."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.mpi

RunProgram = Callable[..., CompletedProcess[str]]


def weights_of(run_program: RunProgram, num_ranks: int, file: Path) -> Tensor:
    """The weights after each sequence, (sequences, values)."""
    finished = run_program(num_ranks, "random_sequences.py", file, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    weights: Tensor = torch.load(file, weights_only=True)
    return weights


@pytest.fixture(scope="module")
def one_rank(run_program: RunProgram, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return weights_of(run_program, 1, tmp_path_factory.mktemp("sequences") / "1.pt")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one_rank(num_ranks: int, one_rank: Tensor, run_program: RunProgram, tmp_path: Path) -> None:
    """Defect: on three ranks, one that owned only what was frozen took part in another's layer with nothing in hand."""
    differences = (weights_of(run_program, num_ranks, tmp_path / "weights.pt") - one_rank).abs().amax(dim=1)
    print(f"largest difference: {float(differences.max()):.1e}")
    assert (differences < 1e-8).all(), f"sequences {differences.ge(1e-8).nonzero().flatten().tolist()} differ"


def test_sequences_differ(one_rank: Tensor) -> None:
    """Agreement proves nothing if all sequences do the same."""
    distances = torch.pdist(one_rank)
    assert float(distances.median()) > 0.1

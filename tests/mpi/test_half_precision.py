"""Half precision over ranks: an overflow on one skips the update on all, and P ranks still equal one."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.mpi

RunProgram = Callable[..., CompletedProcess[str]]

# Rounding differs with the order of sums, and half precision turns it into whole steps of 2^-11 or 2^-8.
PRECISIONS = {"fp64": 1e-12, "bf16": 2e-2, "fp16": 3e-3}
COMM_DTYPES = {"fp32-on-fp16": 2e-3, "fp32-on-bf16": 1e-2}


def train(run_program: RunProgram, num_ranks: int, folder: Path, *arguments: str) -> Path:
    folder.mkdir()
    finished = run_program(num_ranks, "train_slots.py", folder, *arguments, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def load(folder: Path, case: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(folder / f"{case}.pt", weights_only=True)["tensors"]
    return tensors


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(difference / torch.cat([value.flatten() for value in theirs.values()]).norm())


@pytest.fixture(scope="module")
def one_rank(run_program: RunProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slots") / "1"
    return train(run_program, 1, folder, "cpu", "mpi", "fp32", *PRECISIONS, *COMM_DTYPES, "overflowing")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one_rank(num_ranks: int, one_rank: Path, run_program: RunProgram, tmp_path: Path) -> None:
    many = train(run_program, num_ranks, tmp_path / "many", "cpu", "mpi", *PRECISIONS, *COMM_DTYPES, "overflowing")
    for precision, tolerance in PRECISIONS.items():
        difference = relative_difference(load(many, precision), load(one_rank, precision))
        assert difference < tolerance, f"{precision}: {difference:.1e}"
    for comm_dtype, tolerance in COMM_DTYPES.items():
        difference = relative_difference(load(many, comm_dtype), load(one_rank, "fp32"))
        assert 1e-7 < difference < tolerance, f"{comm_dtype}: {difference:.1e}"
    scales = [torch.load(folder / "overflowing.pt", weights_only=True)["scales"] for folder in (one_rank, many)]
    assert scales[0] == scales[1], "a rank divides each loss by their number, which must not matter"
    assert scales[0][0] == 2.0**21
    assert scales[0][-1] == scales[0][-2], "the last update is a good one"


def test_half_precision_on_the_wire_rounds_on_one_rank_too(one_rank: Path) -> None:
    for comm_dtype, tolerance in COMM_DTYPES.items():
        difference = relative_difference(load(one_rank, comm_dtype), load(one_rank, "fp32"))
        assert 1e-7 < difference < tolerance, f"{comm_dtype}: {difference:.1e}"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_small_factors_on_fp16_keep_their_digits(num_ranks: int, run_program: RunProgram) -> None:
    """Defect: output factors of 1e-8 that shared a scale with input factors of 1e4 arrived as zeros."""
    finished = run_program(num_ranks, "factors_on_fp16.py", str(num_ranks))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == num_ranks
    for line in lines:
        assert 1e-7 < float(line.rpartition(" ")[2]) < 1e-3, line


@pytest.mark.gpu
def test_ranks_that_share_a_gpu_equal_one_rank(run_program: RunProgram, tmp_path: Path) -> None:
    one = train(run_program, 1, tmp_path / "1", "cuda", "mpi", *PRECISIONS)
    for num_ranks in (2, 4):
        many = train(run_program, num_ranks, tmp_path / str(num_ranks), "cuda", "mpi", *PRECISIONS)
        for precision, tolerance in PRECISIONS.items():
            difference = relative_difference(load(many, precision), load(one, precision))
            assert difference < tolerance, f"{num_ranks} ranks, {precision}: {difference:.1e}"


@pytest.mark.gpu
def test_nccl_with_one_rank_equals_mpi(run_program: RunProgram, tmp_path: Path) -> None:
    mpi, nccl = (train(run_program, 1, tmp_path / name, "cuda", name, "fp64", "fp16") for name in ("mpi", "nccl"))
    assert relative_difference(load(nccl, "fp64"), load(mpi, "fp64")) < 1e-12
    assert "NCCL" in torch.load(nccl / "fp64.pt", weights_only=True)["description"]

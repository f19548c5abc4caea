"""The same run on any number of ranks: weights, BatchNorm statistics and metrics agree with one rank's."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.mpi

RunProgram = Callable[..., CompletedProcess[str]]

NUM_ITERATIONS = 20
TOLERANCES = {
    "kfac": 1e-9,
    "kfac_fp32": 1e-3,  # see train_cases.py
    "kfac_variants": 1e-9,
    "adaptive": 1e-9,
    "sgd": 1e-9,
    "one_cycle": 1e-9,
    "muon": 1e-9,
    "adamw": 1e-9,
    "lars": 1e-9,
    "redundant_owners": 1e-9,
}


def train(run_program: RunProgram, num_ranks: int, folder: Path, *cases: str) -> Path:
    finished = run_program(num_ranks, "train_cases.py", folder, *cases, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


@pytest.fixture(scope="session")
def one_rank(run_program: RunProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(run_program, 1, tmp_path_factory.mktemp("ranks_1"), *TOLERANCES)


def metrics(folder: Path, case: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / case / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all tensors together."""
    assert ours.keys() == theirs.keys()
    difference, norm = (
        torch.cat([(value - offset * theirs[name]).flatten() for name, value in source.items()]).norm()
        for source, offset in ((ours, 1), (theirs, 0))
    )
    return float(difference / norm)


def compare(folder: Path, one_rank: Path, case: str) -> None:
    """Fails where anything of a case differs by more than its tolerance; prints what was measured."""
    tolerance = TOLERANCES[case]
    ours, theirs = (torch.load(run / f"{case}.pt", weights_only=True) for run in (folder, one_rank))
    measured = {part: relative_difference(ours[part], theirs[part]) for part in ("parameters", "buffers")}
    for kind, count in (("train", NUM_ITERATIONS), ("eval", None)):
        pairs = list(zip(metrics(folder, case, kind), metrics(one_rank, case, kind), strict=True))
        assert pairs
        assert count in (None, len(pairs))
        differences = [abs(our["loss"] - their["loss"]) / their["loss"] for our, their in pairs]
        measured[f"{kind} loss"] = max(differences)
        top1 = [(our["top1"], their["top1"]) for our, their in pairs]
        if tolerance < 1e-6:  # in fp32 an image on the border may change sides
            assert top1 == [(pytest.approx(their, rel=1e-12), their) for _, their in top1], f"{case}: {kind} top-1"
        else:
            assert max(abs(our - their) for our, their in top1) < 1.0, f"{case}: {kind} top-1"
    compare_fisher_records(metrics(folder, case, "fisher"), metrics(one_rank, case, "fisher"))
    text = f"{case} ({folder.name}): " + ", ".join(f"{part} {value:.1e}" for part, value in measured.items())
    print(text)
    assert max(measured.values()) < tolerance, text


def compare_fisher_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Diff and spectra travel from the owners: what is refreshed when, and what the records say of it, agree."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for key, value in their.items():
            assert our[key] == (pytest.approx(value, rel=1e-6, abs=1e-12) if isinstance(value, float) else value)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_agree_with_one_rank(
    num_ranks: int, run_program: RunProgram, one_rank: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = [case for case in TOLERANCES if case != "redundant_owners"]
    folder = train(run_program, num_ranks, tmp_path_factory.mktemp(f"ranks_{num_ranks}_"), *cases)
    for case in cases:
        compare(folder, one_rank, case)
        # Who owns what does not change what travels, as long as each layer has one owner.
        ours, theirs = ([t["communication_bytes"] for t in metrics(run, case, "train")] for run in (folder, one_rank))
        assert ours == theirs


def test_diff_of_every_refresh(one_rank: Path) -> None:
    records = metrics(one_rank, "kfac_variants", "fisher")
    assert [record["iteration"] for record in records] == [3 * number for number in range(1, 7) for _ in range(8)]


def test_adaptive_refresh_adapts(one_rank: Path) -> None:
    """Else the comparison of what is refreshed when, which depends on Diff of all ranks, proves nothing."""
    refreshes = [record for record in metrics(one_rank, "adaptive", "fisher") if "diff" in record]
    assert 5 * 3 < len(refreshes) < 8 * NUM_ITERATIONS / 2  # 8 matrices; some became rare, none was dropped


def test_more_ranks_than_layers(
    run_program: RunProgram, one_rank: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = train(run_program, 8, tmp_path_factory.mktemp("ranks_8_"), "redundant_owners")
    compare(folder, one_rank, "redundant_owners")


def test_bytes_equal_the_formula(one_rank: Path) -> None:
    """Stage 3: Σ n(n+1)/2 of the matrices that are due, and the gradients; stage 6: the gradients again."""

    def triangle(size: int) -> int:
        return size * (size + 1) // 2

    # digits_cnn: two 3×3 convolutions without bias, 1 → 16 → 32 channels, and a linear layer of 128 → 10.
    kronecker = sum(map(triangle, (9, 16, 9 * 16, 32, 128 + 1, 10)))
    diagonal, full = 2 * (16 + 32), triangle(2 * 16) + triangle(2 * 32)
    gradients = 9 * 16 + 9 * 16 * 32 + 2 * (16 + 32) + 129 * 10
    refresh = {
        "kfac": 8 * (kronecker + diagonal + 2 * gradients),
        "kfac_fp32": 4 * (kronecker + diagonal + 2 * gradients),
        "kfac_variants": 8 * (kronecker + full + 2 * gradients),
        "sgd": 8 * 2 * gradients,
    }
    for case, expected in refresh.items():
        sent = [record["communication_bytes"] for record in metrics(one_rank, case, "train")]
        stale = 8 * 2 * gradients
        if case == "kfac_variants":  # refreshed every third iteration
            assert sent == [stale if iteration % 3 else expected for iteration in range(NUM_ITERATIONS)]
        else:
            assert sent == [expected] * NUM_ITERATIONS
        assert metrics(one_rank, case, "summary")[0]["communication_bytes"] == sum(sent)


def test_cases_learn(one_rank: Path) -> None:
    """Agreement proves nothing if the weights never move, or if all randomness is off."""
    losses = {case: [record["loss"] for record in metrics(one_rank, case, "eval")] for case in TOLERANCES}
    for case, values in losses.items():
        assert values[-1] < 0.9 * 2.303, f"{case}: test loss {values[-1]}, ln 10 = 2.303"
    states = [
        torch.load(one_rank / f"{case}.pt", weights_only=True)["parameters"] for case in ("kfac", "kfac_variants")
    ]
    assert relative_difference(*states) > 1e-2

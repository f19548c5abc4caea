"""Ranks whose models, freezing, gradients or states differ: refused on all of them at once, or brought together."""

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def said(run_program: Callable[..., CompletedProcess[str]]) -> dict[tuple[str, int], str]:
    """What each rank raised in each case, `nothing` if it raised nothing; the program asserts all else."""
    finished = run_program(2, "differing_ranks.py", timeout=100)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = [line.split(" | ", 2) for line in finished.stdout.splitlines()]
    return {(case, int(rank)): text for case, rank, text in lines}


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("depth", "2.weight (4, 4) torch.float32 on rank 1"),
        ("width", "weight (5, 4) torch.float32 on rank 1, weight (4, 4) torch.float32 on rank 0"),
        ("order", "b.weight (4, 4) torch.float32 on rank 1, a.weight (4, 4) torch.float32 on rank 0"),
        ("dtype", "weight (4, 4) torch.bfloat16 on rank 1, weight (4, 4) torch.float32 on rank 0"),
        ("frozen", "bias (4,) torch.float32 frozen on rank 1, bias (4,) torch.float32 on rank 0"),
    ],
)
def test_models_that_differ_are_refused(
    kind: str, case: str, difference: str, said: dict[tuple[str, int], str]
) -> None:
    """Defect: the job hung, or weights went into other layers where only the order differed."""
    for rank in (0, 1):
        assert f"the ranks' models differ: {difference}" in said[f"{kind} {case}", rank]


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_freezing_on_one_rank_only_is_refused_on_all(kind: str, said: dict[tuple[str, int], str]) -> None:
    """Defect: the job hung, or MPI ended it."""
    for rank in (0, 1):
        assert said[f"{kind} freezes", rank].startswith("2.weight is trained on 1 of 2 ranks and frozen on the others")


@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("kfac clips", "max_grad_norm=None on rank 1, max_grad_norm=1 on rank 0"),
        ("kfac refreshes", "refresh=2 on rank 1, refresh=1 on rank 0"),
        ("kfac averages", "ema_decay=0.5 on rank 1, ema_decay=None on rank 0"),
        ("kfac sends", "comm_dtypes=CommDtypes(factors=torch.float16, gradients=None) on rank 1"),
        ("kfac tracks", "track_changes=True on rank 1"),
        ("kfac scaled", "loss_scaler=True on rank 1"),
        ("sgd clips", "max_grad_norm=2 on rank 1, max_grad_norm=1 on rank 0"),
        ("lars trusts", "trust_coefficient=0.002 on rank 1, trust_coefficient=0.001 on rank 0"),
    ],
)
def test_arguments_that_differ_are_refused(case: str, difference: str, said: dict[tuple[str, int], str]) -> None:
    """Defect: the job hung (as after a search that draws on every rank), or each owner clipped or averaged its way."""
    for rank in (0, 1):
        assert said[case, rank].startswith(f"the ranks' optimizers differ: {difference}"), said[case, rank]


def test_a_set_of_patterns_which_each_rank_orders_its_own_way_is_no_difference(
    said: dict[tuple[str, int], str],
) -> None:
    assert [said["kfac skips", rank] for rank in (0, 1)] == ["nothing", "nothing"]


def test_a_schedule_that_decides_otherwise_on_one_rank_is_refused_on_all(said: dict[tuple[str, int], str]) -> None:
    """Defect: the job hung."""
    for rank in (0, 1):
        assert "in what they refresh" in said["kfac decides", rank]


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_settings_that_differ_are_refused(kind: str, said: dict[tuple[str, int], str]) -> None:
    """Defect: the ranks' weights went apart without a word."""
    for rank in (0, 1):
        text = said[f"{kind} sets", rank]
        assert text.startswith("the ranks' settings differ: parameter group 0: lr=0.001, momentum="), text
        assert "on rank 1, parameter group 0: lr=0.01, momentum=" in text
        assert "ReduceLROnPlateau" in text
        assert said[f"{kind} rounds", rank] == "nothing"


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_weights_that_one_rank_alone_loaded_are_refused(kind: str, said: dict[tuple[str, int], str]) -> None:
    """Defect: the ranks trained weights that stayed apart, without a word."""
    for rank in (0, 1):
        assert said[f"{kind} loads weights", rank].startswith("the ranks' weights differ: 0.weight (bits ")


@pytest.mark.parametrize("kind", ["kfac", "sgd"])
def test_losses_that_are_scaled_otherwise_on_each_rank_are_refused(kind: str, said: dict[tuple[str, int], str]) -> None:
    """Defect: each rank undid its own scale on what it owned of the average, which was another for each layer."""
    for rank in (0, 1):
        assert "losses scaled by 196608 on rank 1, losses scaled by 131072 on rank 0" in said[f"{kind} scales", rank]


def test_settings_of_several_numbers_may_round_apart_and_those_in_tensors_may_not_differ(
    said: dict[tuple[str, int], str],
) -> None:
    """Defect: betas were compared to the last digit, and learning rates in tensors not at all."""
    for rank in (0, 1):
        assert said["betas", rank] == "nothing"
        assert "parameter group 0: lr=0.001, betas=(0.85, 0.99)" in said["rates", rank]


def test_a_state_loaded_on_one_rank_only_is_refused_on_all(said: dict[tuple[str, int], str]) -> None:
    for rank in (0, 1):
        assert "load_state_dict must be called on every rank" in said["loads", rank]


def test_parameter_groups_that_differ_are_refused(said: dict[tuple[str, int], str]) -> None:
    for rank in (0, 1):
        assert "the ranks' parameter groups differ: 4.weight (3, 30) torch.float32 on rank 1" in said["adds", rank]


def test_parameters_beside_the_models_that_differ_are_refused(said: dict[tuple[str, int], str]) -> None:
    for rank in (0, 1):
        assert "not of the model (4,) torch.float32 on rank 1" in said["beside", rank]

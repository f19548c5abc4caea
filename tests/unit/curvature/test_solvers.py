"""Damping, factorisation and preconditioning against dense matrices.

vec is row-major: entry (i, j) of a d_out × n gradient stands at i·n + j, so that G X A ↔ kron(G, A) vec(X).
"""

import math

import pytest
import torch
from torch import nn

from kfac_dist.curvature import precondition as precondition_module
from kfac_dist.curvature import solvers
from kfac_dist.curvature.blocks.batchnorm import BatchNormBlock
from kfac_dist.curvature.blocks.conv2d import Conv2dBlock
from kfac_dist.curvature.blocks.linear import LinearBlock
from kfac_dist.curvature.inversion import MIN_INTERVAL_FOR_INVERSE, InverseRefresh, InversionTask, pays_to_invert
from kfac_dist.curvature.precondition import Preconditioner
from kfac_dist.curvature.running import BlockCurvature
from kfac_dist.curvature.solvers import (
    Solver,
    StackBatches,
    damping_shifts,
    mean_diagonals,
    multiply,
    precondition_kronecker,
    precondition_vectors,
)
from tests.unit.allocated_bytes import AllocatedBytes
from tests.unit.curvature.layer_factors import random

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def random_psd(count, size, seed=0, rank=None):
    roots = random(count, size, rank or size, seed=seed)
    return roots @ roots.mT


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# Damping


def damp_factors(A, G, damping):
    """Both stacks with the damping of Eq. 12, factored form, split between them."""
    shift_A, shift_G = damping_shifts(mean_diagonals(A), mean_diagonals(G), A.new_full((len(A),), damping))
    damped_A = A + shift_A[:, None, None] * identity(A.shape[-1])
    return damped_A, G + shift_G[:, None, None] * identity(G.shape[-1])


def test_damping_numbers_by_hand():
    # tr A / dim A = 8, tr G / dim G = 2 → pi = 2; √gamma = 0.3 → 0.6 on A, 0.15 on G.
    A = torch.tensor([[[4.0, 1.0], [1.0, 12.0]]], dtype=torch.float64)
    G = torch.tensor([[[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 3.0]]], dtype=torch.float64)
    A_damped, G_damped = damp_factors(A, G, 0.09)
    assert_close(A_damped[0], torch.tensor([[4.6, 1.0], [1.0, 12.6]], dtype=torch.float64))
    assert_close(G_damped[0], G[0] + 0.15 * identity(3))


def test_each_pair_of_a_stack_has_a_pi_of_its_own():
    A, G = random_psd(3, 4), random_psd(3, 2, seed=1)
    A_damped, G_damped = damp_factors(A, G, 0.01)
    for group in range(3):
        pi = math.sqrt((A[group].trace().item() / 4) / (G[group].trace().item() / 2))
        assert_close(A_damped[group], A[group] + pi * 0.1 * identity(4))
        assert_close(G_damped[group], G[group] + 0.1 / pi * identity(2))


@pytest.mark.parametrize(("scale_A", "scale_G"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_is_1_where_a_trace_is_0(scale_A, scale_G):
    A, G = scale_A * random_psd(1, 3), scale_G * random_psd(1, 2)
    A_damped, G_damped = damp_factors(A, G, 0.04)
    assert_close(A_damped, A + 0.2 * identity(3))
    assert_close(G_damped, G + 0.2 * identity(2))


def test_damping_leaves_its_arguments_unchanged():
    A, G = random_psd(2, 3), random_psd(2, 2)
    copies = A.clone(), G.clone()
    StackBatches([A, G]).add_to_diagonals([torch.ones(2, dtype=torch.float64)] * 2)
    assert torch.equal(A, copies[0])
    assert torch.equal(G, copies[1])


@pytest.mark.parametrize("damping", [0.0, -0.1, math.nan])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match=r"damping must be > 0, got"):
        InversionTask(kronecker_curvature(), damping, ["A", "G"])


# Cholesky


@pytest.mark.parametrize("batched_up_to", [512, 3, 0])
def test_batches_equal_one_matrix_at_a_time(batched_up_to, monkeypatch):
    monkeypatch.setattr(solvers, "_BATCHED_UP_TO", batched_up_to)
    stacks = [random_psd(1, 4), random_psd(3, 2, seed=1), random_psd(2, 4, seed=2), random_psd(1, 1, seed=3)]
    shifts = [torch.arange(1.0, len(stack) + 1, dtype=torch.float64) for stack in stacks]
    batches = StackBatches(stacks)
    for mean, stack in zip(batches.mean_diagonals(), stacks, strict=True):
        assert_close(mean, torch.stack([matrix.trace() / len(matrix) for matrix in stack]))
    batches.add_to_diagonals(shifts)
    factorised, failed = batches.factorise()
    assert failed.tolist() == [False] * 4
    assert [solver.is_inverse for solver in factorised] == [False, True, False, True]
    for stack, shift, solver in zip(stacks, shifts, factorised, strict=True):
        assert solver.matrix.shape == stack.shape
        for matrix, value, found in zip(stack, shift, solver.matrix, strict=True):
            damped = matrix + value * identity(len(matrix))
            if solver.is_inverse:
                assert_close(found @ damped, identity(len(matrix)))
            else:
                assert_close(found, found.tril())
                assert_close(found @ found.T, damped)


@pytest.mark.parametrize("bad", [-5.0, math.nan])
def test_only_the_stack_with_a_bad_matrix_is_reported(bad):
    stacks = [random_psd(2, 3), random_psd(2, 3, seed=1), random_psd(1, 2)]
    stacks[1][1, 0, 0] = bad
    batches = StackBatches(stacks)
    batches.add_to_diagonals([torch.full((len(stack),), 0.1, dtype=torch.float64) for stack in stacks])
    assert batches.factorise()[1].tolist() == [False, True, False]


def test_a_nan_is_reported_where_the_routine_says_that_all_went_well(monkeypatch):
    """Defect: CUDA's does (pytorch/pytorch#64818), and a solver of nan replaced the previous one."""
    cholesky_ex = torch.linalg.cholesky_ex

    def as_on_cuda(batch, out):
        is_spoilt = batch.isnan().any(dim=-1).any(dim=-1)
        factor, _ = cholesky_ex(batch.nan_to_num(1.0))
        out[0].copy_(factor.where(~is_spoilt[:, None, None], torch.full_like(factor, math.nan).tril()))
        out[1].zero_()

    monkeypatch.setattr(torch.linalg, "cholesky_ex", as_on_cuda)
    test_only_the_stack_with_a_bad_matrix_is_reported(math.nan)


# Preconditioning


@pytest.mark.parametrize("form", ["small", "large", "inverse"])
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 3, 5), (1, 5, 3), (2, 3, 4), (4, 1, 2)])
def test_preconditioned_gradient_equals_a_dense_solve(count, rows, columns, form, monkeypatch):
    if form == "large":
        monkeypatch.setattr(solvers, "_SOLVED_BY_TRIANGLES_FROM", 1)
    A = random_psd(count, columns, rank=2)  # singular but for the damping
    G = random_psd(count, rows, seed=1, rank=1)
    gradient = random(count, rows, columns, seed=2)
    A_damped, G_damped = damp_factors(A, G, 1e-2)
    A_solver, G_solver = Solver(torch.linalg.cholesky(A_damped)), Solver(torch.linalg.cholesky(G_damped))
    if form == "inverse":
        A_solver, G_solver = A_solver.inverted(), G_solver.inverted()
    solved = precondition_kronecker(gradient, A_solver, G_solver)
    for group in range(count):
        dense = torch.kron(G_damped[group], A_damped[group])
        expected = torch.linalg.solve(dense, gradient[group].flatten())
        assert_close(solved[group].flatten(), expected)


def test_vectors_are_solved_block_by_block():
    stack, gradient = random_psd(3, 4) + 0.1 * identity(4), random(3, 4, 1, seed=1)
    solved = precondition_vectors(gradient, Solver(torch.linalg.cholesky(stack)))
    dense = torch.linalg.solve(torch.block_diag(*stack), gradient.flatten())
    assert_close(solved.flatten(), dense)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("given", [False, True])
def test_products_one_by_one_equal_batched_ones(count, given, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(solvers, "_SHARED_FROM", 0)
    left, right = random(count, 4, 3, seed=1), random(count, 3, 5, seed=2)
    out = torch.full((count, 4, 5), math.nan, dtype=torch.float64) if given else None
    product = multiply(left, right, out)
    assert_close(product, torch.einsum("kij,kjl->kil", left, right))
    assert out is None or product.data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    ("count", "threads", "one_by_one"), [(3, 2, True), (4, 2, False), (1, 2, True), (30, 16, False)]
)
def test_only_products_that_would_leave_threads_idle_go_one_by_one(count, threads, one_by_one, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls = []
    monkeypatch.setattr(torch, "mm", lambda left, right, out: calls.append("mm"))
    monkeypatch.setattr(torch, "bmm", lambda left, right, out: calls.append("bmm"))
    large, small = torch.zeros(count, 128, 128), torch.zeros(count, 2, 2)
    multiply(large, large)
    assert calls == (["mm"] * count if one_by_one else ["bmm"])
    calls.clear()
    multiply(small, small)
    assert calls == ["bmm"], "each is too small to be shared out"


@pytest.mark.parametrize("form", ["inverse", "large"])
def test_the_first_result_is_written_where_there_is_memory_for_it_and_stays(form, monkeypatch):
    """A block may solve with one matrix more than once, and use all results."""
    monkeypatch.setattr(solvers, "_SOLVED_BY_TRIANGLES_FROM", 1)
    made, out = Solver(torch.linalg.cholesky(random_psd(2, 3) + identity(3))), torch.zeros(2, 3, 4, dtype=torch.float64)
    made = made.inverted() if form == "inverse" else made
    for solve, shape in (("solve", (2, 3, 4)), ("solve_right", (2, 4, 3))):
        solver = made.into(out.view(shape))
        rights = [random(*shape, seed=seed) for seed in (1, 2)]
        assert getattr(solver, solve)(random(2, 3, 3, seed=3)).data_ptr() != out.data_ptr()
        results = [getattr(solver, solve)(right) for right in rights]
        results.append(getattr(solver, solve)(results[0]))
        assert results[0].data_ptr() == out.data_ptr()
        for result, right in zip(results, [*rights, results[0]], strict=True):
            assert_close(result, getattr(made, solve)(right))


@pytest.mark.parametrize("is_inverse", [False, True])
def test_a_solver_from_a_checkpoint_rounds_as_the_one_that_was_saved(is_inverse):
    """Checkpoints hold rows; what the routines give may hold columns."""
    size = solvers._SOLVED_BY_TRIANGLES_FROM + 3
    factor, _ = torch.linalg.cholesky_ex(random_psd(2, size) + identity(size))
    made = Solver(factor).inverted() if is_inverse else Solver(factor)
    restored = Solver.restored(made.matrix.contiguous().clone(), is_inverse)
    assert restored.matrix.stride() == made.matrix.stride()
    right = random(2, size, 40, seed=1)
    assert restored.solve(right).equal(made.solve(right))
    assert restored.solve_right(right.mT).equal(made.solve_right(right.mT))


# What an owner keeps: running average, refresh, retries


def kronecker_curvature(groups=1, bias=True, name="layer"):
    layer = nn.Conv2d(2 * groups, 3 * groups, 2, groups=groups, bias=bias, dtype=torch.float64)
    return curvature_of(Conv2dBlock(name, layer, list(layer.parameters())))


def curvature_of(block):
    curvature = BlockCurvature(block)
    for seed, (matrix, (count, size)) in enumerate(curvature.block.factor_shapes.items()):
        curvature.averages[matrix].update(random_psd(count, size, seed=seed, rank=2), None)
    return curvature


def batchnorm_curvature(form, name="norm"):
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    curvature = BlockCurvature(BatchNormBlock(name, layer, list(layer.parameters()), form))
    curvature.averages["F"].update(random_psd(*curvature.block.factor_shapes["F"]), None)
    return curvature


def matrices_of(*curvatures):
    return {curvature.block.name: list(curvature.block.factor_shapes) for curvature in curvatures}


def precondition(curvature, gradient):
    [[(_, direction)]] = Preconditioner().apply([curvature], [gradient])
    return direction


def precondition_all(preconditioner, curvatures, gradients):
    directions = {}
    for group in preconditioner.apply(curvatures, gradients):
        directions |= {number: direction.clone() for number, direction in group}
    return [directions[number] for number in range(len(curvatures))]


def tasks_for(*curvatures, damping=0.1):
    return [InversionTask(curvature, damping, list(curvature.block.factor_shapes)) for curvature in curvatures]


def refresh_inverses(curvatures, dampings, matrices, expected_interval=lambda key: 1):
    tasks = [InversionTask(c, damping, matrices[c.block.name]) for c, damping in zip(curvatures, dampings, strict=True)]
    return InverseRefresh().refresh(tasks, expected_interval)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_kronecker_block_equals_a_dense_solve_of_weight_and_bias(groups, bias):
    curvature = kronecker_curvature(groups, bias)
    report = refresh_inverses([curvature], [0.01], matrices_of(curvature))
    assert (report.num_retries, report.num_kept) == (0, 0)
    weight, offset = random(3 * groups, 2, 2, 2, seed=8), random(3 * groups, seed=9)
    flat = torch.cat([weight.flatten(), offset]) if bias else weight.flatten()

    direction = precondition(curvature, flat.clone())
    A_damped, G_damped = damp_factors(curvature.running["A"], curvature.running["G"], 0.01)
    expected_weight, expected_offset = [], []
    for group in range(groups):
        rows = slice(3 * group, 3 * group + 3)
        gradient = weight[rows].flatten(1)
        if bias:
            gradient = torch.cat([gradient, offset[rows, None]], dim=1)
        solved = torch.linalg.solve(torch.kron(G_damped[group], A_damped[group]), gradient.flatten())
        solved = solved.view(3, -1)
        expected_weight.append(solved[:, :8].flatten())
        expected_offset.append(solved[:, 8:].flatten())
    assert_close(direction, torch.cat(expected_weight + expected_offset))


@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
def test_batchnorm_block_equals_a_dense_solve_of_fisher_plus_damping(form):
    curvature = batchnorm_curvature(form)
    refresh_inverses([curvature], [0.3], matrices_of(curvature))
    gradient = random(6, seed=5)
    dense = 0.3 * identity(6)
    for index, matrix in enumerate(curvature.running["F"]):
        indices = {"full": list(range(6)), "unit": [index, 3 + index], "diagonal": [index]}[form]
        dense[torch.tensor(indices)[:, None], torch.tensor(indices)] += matrix
    assert_close(precondition(curvature, gradient), torch.linalg.solve(dense, gradient))


def test_without_an_inverse_the_gradient_passes_through():
    curvature = kronecker_curvature()
    gradient = random(curvature.block.num_values)
    assert torch.equal(precondition(curvature, gradient), gradient)


def test_damping_does_not_build_up_in_the_running_fisher():
    curvature = kronecker_curvature()
    before = {matrix: value.clone() for matrix, value in curvature.running.items()}
    refresh_inverses([curvature], [0.5], matrices_of(curvature))
    first = {matrix: solver.matrix.clone() for matrix, solver in curvature.solvers.items()}
    for _ in range(3):
        refresh_inverses([curvature], [0.5], matrices_of(curvature))
    for matrix in ("A", "G"):
        assert torch.equal(curvature.running[matrix], before[matrix])
        assert torch.equal(curvature.solvers[matrix].matrix, first[matrix])


def test_running_average_is_unbiased_from_the_first_factor_on():
    decay, factors = 0.8, [random_psd(1, 2, seed=seed) for seed in range(5)]
    curvature = BlockCurvature(LinearBlock("layer", nn.Linear(2, 2, bias=False), []))
    for count in range(1, 6):
        curvature.averages["A"].update(factors[count - 1].clone(), decay)
        weights = [decay ** (count - 1 - index) for index in range(count)]
        weighted = sum(weight * value for weight, value in zip(weights, factors[:count], strict=True))
        assert_close(curvature.running["A"], weighted / sum(weights))


def test_without_a_decay_the_newest_factor_replaces_the_last():
    curvature = BlockCurvature(LinearBlock("layer", nn.Linear(2, 2, bias=False), []))
    for seed in range(3):
        curvature.averages["A"].update(random_psd(1, 2, seed=seed), None)
    assert torch.equal(curvature.running["A"], random_psd(1, 2, seed=2))


def test_a_failing_block_alone_is_retried_with_ten_times_the_damping():
    good, bad = batchnorm_curvature("diagonal", "good"), batchnorm_curvature("diagonal", "bad")
    bad.running["F"][2] = -1.0  # needs a damping above 1: 0.05 and 0.5 fail, 5 does
    report = refresh_inverses([good, bad], [0.05, 0.05], matrices_of(good, bad))
    assert (report.num_retries, report.num_kept) == (2, 0)
    assert_close(good.solvers["F"].matrix, 1 / (good.running["F"] + 0.05))
    assert_close(bad.solvers["F"].matrix, 1 / (bad.running["F"] + 5.0))


@pytest.mark.parametrize("hopeless", [-1e6, math.nan])
def test_as_a_last_resort_the_previous_inverse_is_kept(hopeless):
    good, bad = kronecker_curvature(name="good"), kronecker_curvature(name="bad")
    refresh_inverses([good, bad], [0.1, 0.1], matrices_of(good, bad))
    previous = {matrix: solver.matrix.clone() for matrix, solver in bad.solvers.items()}
    bad.running["G"][0, 0, 0] = hopeless
    report = refresh_inverses([good, bad], [0.2, 0.2], matrices_of(good, bad))
    assert (report.num_retries, report.num_kept) == (3, 1)
    for matrix in ("A", "G"):  # both, so that they fit each other
        assert torch.equal(bad.solvers[matrix].matrix, previous[matrix])
    A_damped, _ = damp_factors(good.running["A"], good.running["G"], 0.2)
    assert_close(good.solvers["A"].matrix, torch.linalg.cholesky(A_damped))


def test_dampings_are_made_on_the_host_whatever_the_default_device_is():
    """Defect: under `torch.set_default_device("cuda")` they were made there, where memory cannot be pinned."""
    curvature = kronecker_curvature()
    with torch.device("meta"):
        InverseRefresh().refresh(tasks_for(curvature))
    assert {solver.matrix.device.type for solver in curvature.solvers.values()} == {"cpu"}


@pytest.mark.parametrize("serves_long", [False, True])
def test_a_singular_matrix_is_retried_rather_than_inverted(serves_long):
    """Its Cholesky factor has a zero on the diagonal, of which `torch.cholesky_inverse` makes an error."""
    curvature = kronecker_curvature()
    for average in curvature.averages.values():
        average.value.fill_(1.0)  # to which a damping of 1e-40 adds nothing
    report = refresh_inverses([curvature], [1e-40], matrices_of(curvature), lambda key: 20 if serves_long else 1)
    assert (report.num_retries, report.num_kept) == (3, 1)
    gradient = random(curvature.block.num_values)
    assert torch.equal(precondition(curvature, gradient), gradient)


def test_a_matrix_that_is_not_refreshed_keeps_its_factors():
    curvature = kronecker_curvature()
    refresh_inverses([curvature], [0.1], matrices_of(curvature))
    previous = {matrix: solver.matrix.clone() for matrix, solver in curvature.solvers.items()}
    curvature.averages["G"].update(random_psd(1, 3, seed=9), None)
    refresh_inverses([curvature], [0.1], {"layer": ["G"]})
    assert torch.equal(curvature.solvers["A"].matrix, previous["A"])
    assert not torch.allclose(curvature.solvers["G"].matrix, previous["G"])


@pytest.mark.parametrize(
    ("shape", "interval", "kept_as_inverse"),
    [
        ((3, 5), 1, {"A": False, "G": True}),  # weight's shape: A is multiplied by 3 columns, G by 5
        ((3, 5), 2, {"A": True, "G": True}),  # and by 6 and 10 in two iterations
        ((4, 4), 1, {"A": True, "G": True}),
        ((1, 40), MIN_INTERVAL_FOR_INVERSE - 1, {"A": False, "G": True}),
        ((1, 40), MIN_INTERVAL_FOR_INVERSE, {"A": True, "G": True}),
    ],
)
def test_a_matrix_that_serves_many_columns_is_kept_as_its_inverse(shape, interval, kept_as_inverse):
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    curvature = curvature_of(LinearBlock("layer", layer, list(layer.parameters())))
    refresh_inverses([curvature], [0.1], matrices_of(curvature), lambda key: interval)
    assert {matrix: solver.is_inverse for matrix, solver in curvature.solvers.items()} == kept_as_inverse
    A, G = (curvature.running[matrix] for matrix in ("A", "G"))
    A_damped, G_damped = damp_factors(A, G, 0.1)
    gradient = random(curvature.block.num_values)
    expected = torch.linalg.solve(torch.kron(G_damped[0], A_damped[0]), gradient)
    assert_close(precondition(curvature, gradient), expected)


def test_each_group_of_a_layer_has_columns_of_its_own():
    layer = nn.Conv2d(12, 6, 1, groups=3, bias=False)  # of each group A has 4 rows and serves 2 columns, G 2 and 4
    block = Conv2dBlock("", layer, list(layer.parameters()))
    assert [pays_to_invert(block, "A", interval) for interval in (1, 2)] == [False, True]
    assert pays_to_invert(block, "G", 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_inverse_is_that_of_a_dense_computation(size):
    stack = random_psd(4, size) + identity(size)
    assert_close(Solver(torch.linalg.cholesky(stack)).inverted().matrix, torch.linalg.inv(stack))


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_inverse_lies_in_memory_as_a_checkpoint_brings_it_back(size, device):
    """A product with its columns one after another would round otherwise: a resumed run would leave the other."""
    factors = torch.linalg.cholesky(random_psd(4, size) + identity(size)).to(device)
    assert Solver(factors).inverted().matrix.is_contiguous()


# Deferred answers, as on a GPU


def test_deferred_and_immediate_refreshes_end_alike():
    results = []
    for deferred in (False, True):
        good, bad = batchnorm_curvature("diagonal", "good"), batchnorm_curvature("diagonal", "bad")
        bad.running["F"][2] = -1.0  # 0.05 and 0.5 fail, 5 does
        refresh = InverseRefresh(deferred)
        reports = [refresh.refresh(tasks_for(good, bad, damping=0.05)), *(refresh.refresh([]) for _ in range(4))]
        results.append((good.solvers["F"].matrix, bad.solvers["F"].matrix))
        assert [report.num_retries for report in reports] == ([0, 1, 1, 0, 0] if deferred else [2, 0, 0, 0, 0])
        assert sum(report.num_kept for report in reports) == 0
    for immediate, deferred in zip(*results, strict=True):
        assert torch.equal(immediate, deferred)


@pytest.mark.parametrize("serves_long", [False, True])
@pytest.mark.parametrize("hopeless", [-1e6, math.nan])
def test_until_a_deferred_answer_is_known_the_device_keeps_the_previous_solvers(hopeless, serves_long):
    curvature, refresh = kronecker_curvature(), InverseRefresh(deferred=True)
    gradient = random(curvature.block.num_values)
    refresh.refresh(tasks_for(curvature), lambda key: 20 if serves_long else 1)
    before = precondition(curvature, gradient)
    curvature.running["G"][0, 0, 0] = hopeless
    reports = [refresh.refresh(tasks_for(curvature))]
    assert_close(precondition(curvature, gradient), before)
    reports += [refresh.refresh([]) for _ in range(5)]
    assert [report.num_retries for report in reports] == [0, 1, 1, 1, 0, 0]
    assert [report.num_kept for report in reports] == [0, 0, 0, 0, 1, 0]
    assert_close(precondition(curvature, gradient), before)


@pytest.mark.parametrize("deferred", [False, True])
def test_the_form_of_a_solver_follows_the_interval_from_the_first_refresh_on(deferred):
    curvature, refresh = kronecker_curvature(), InverseRefresh(deferred)
    for interval, is_inverse in ((1, False), (1, False), (20, True), (20, True), (2, False), (2, False)):
        refresh.refresh(tasks_for(curvature), lambda key, interval=interval: interval)
        forms = {matrix: solver.is_inverse for matrix, solver in curvature.solvers.items()}
        assert forms == {"A": is_inverse, "G": True}, "G, 3 rows, is multiplied by 9 columns in every iteration"


@pytest.mark.parametrize("deferred", [False, True])
def test_a_failure_where_the_form_changes_keeps_the_previous_solvers(deferred):
    curvature, refresh = kronecker_curvature(), InverseRefresh(deferred)
    gradient = random(curvature.block.num_values)
    refresh.refresh(tasks_for(curvature), lambda key: 20)
    before = precondition(curvature, gradient)
    curvature.running["G"][0, 0, 0] = math.nan
    refresh.refresh(tasks_for(curvature), lambda key: 1)
    assert torch.equal(precondition(curvature, gradient), before)


def test_a_first_refresh_that_fails_leaves_the_plain_gradient():
    for deferred in (False, True):
        curvature = kronecker_curvature()
        curvature.running["A"][0, 0, 0] = math.nan
        InverseRefresh(deferred).refresh(tasks_for(curvature))
        gradient = random(curvature.block.num_values)
        assert torch.equal(precondition(curvature, gradient), gradient)


def test_a_block_that_fails_and_is_refreshed_again_keeps_its_higher_damping():
    curvature, refresh = batchnorm_curvature("diagonal"), InverseRefresh(deferred=True)
    curvature.running["F"][2] = -0.3
    for _ in range(2):
        refresh.refresh(tasks_for(curvature, damping=0.05))
    assert_close(curvature.solvers["F"].matrix, 1 / (curvature.running["F"] + 0.5))


def test_what_is_to_be_tried_again_is_part_of_the_state():
    results = []
    for restored in (False, True):
        curvature, refresh = batchnorm_curvature("diagonal"), InverseRefresh(deferred=True)
        curvature.running["F"][2] = -0.3
        refresh.refresh(tasks_for(curvature, damping=0.05))
        state = refresh.state_dict()
        assert state == {"norm": (0.05, ["F"], 1)}
        if restored:
            refresh = InverseRefresh(deferred=True)
            refresh.load_state_dict(state, {"norm": curvature})
        refresh.refresh([])
        results.append(curvature.solvers["F"].matrix)
    assert torch.equal(*results)
    assert_close(results[0], 1 / (curvature.running["F"] + 0.5))


# Many blocks together


def many_curvatures():
    """Three convolutions of one shape, one of them with two groups' worth, a linear layer, and three BatchNorms."""
    curvatures = [kronecker_curvature(groups, name=f"conv{n}") for n, groups in enumerate((1, 2, 1))]
    linear = nn.Linear(8, 3, dtype=torch.float64)  # with its bias as large as the convolutions: 9 columns, 3 rows
    curvatures.append(BlockCurvature(LinearBlock("linear", linear, list(linear.parameters()))))
    for seed, (matrix, (count, size)) in enumerate(curvatures[-1].block.factor_shapes.items()):
        curvatures[-1].averages[matrix].update(random_psd(count, size, seed=seed + 20), None)
    curvatures += [batchnorm_curvature(form, f"{form}{n}") for n, form in enumerate(("unit", "diagonal", "diagonal"))]
    return curvatures


@pytest.mark.parametrize("kept_from", [0, 1 << 40])
@pytest.mark.parametrize("interval", [1, 20])
def test_blocks_solved_together_equal_blocks_solved_alone(interval, kept_from, monkeypatch):
    monkeypatch.setattr(precondition_module, "_KEPT_FROM", kept_from)
    curvatures = many_curvatures()
    InverseRefresh().refresh(tasks_for(*curvatures), lambda key: interval)
    gradients = [random(curvature.block.num_values, seed=seed) for seed, curvature in enumerate(curvatures)]
    alone = [precondition(curvature, gradient) for curvature, gradient in zip(curvatures, gradients, strict=True)]
    together = Preconditioner()
    for _ in range(2):  # the second time with solvers that share memory
        for actual, expected in zip(precondition_all(together, curvatures, gradients), alone, strict=True):
            assert_close(actual, expected)
    shapes = {tuple(curvature.block.factor_shapes.values()) for curvature in curvatures}
    assert len(shapes) == 4


@pytest.mark.parametrize("kept_from", [0, 1 << 40])
def test_small_blocks_are_passed_on_together_and_large_ones_lie_in_memory_that_is_kept(kept_from, monkeypatch):
    """For small ones, memory that is kept and a hand-over for each group take longer than they save."""
    monkeypatch.setattr(precondition_module, "_KEPT_FROM", kept_from)
    curvatures = many_curvatures()[1:]  # three alike, and three BatchNorms
    gradients = [random(curvature.block.num_values, seed=seed) for seed, curvature in enumerate(curvatures)]
    InverseRefresh().refresh(tasks_for(*curvatures[:-1]), lambda key: 20)  # the last is not solved yet
    together = Preconditioner()
    groups = [sorted(number for number, _ in group) for group in together.apply(curvatures, gradients)]
    assert sorted(groups) == ([[0, 1, 2], [3], [4], [5]] if kept_from == 0 else [[0, 1, 2, 3, 4, 5]])
    assert bool(together._memory) == (kept_from == 0)


@pytest.mark.parametrize("deferred", [False, True])
def test_inverses_of_one_shape_share_memory_that_refreshes_write_to(deferred):
    curvatures = many_curvatures()
    refresh, together = InverseRefresh(deferred), Preconditioner()
    refresh.refresh(tasks_for(*curvatures), lambda key: 20)
    gradients = [random(curvature.block.num_values, seed=seed) for seed, curvature in enumerate(curvatures)]
    precondition_all(together, curvatures, gradients)

    def storages():
        return [c.solvers["G" if "G" in c.solvers else "F"].matrix.untyped_storage().data_ptr() for c in curvatures]

    first = storages()
    assert len(set(first[:4])) == 1
    assert len({first[0], first[4], first[5]}) == 3
    assert first[5] == first[6]
    precondition_all(together, curvatures, gradients)
    assert storages() == first, "nothing is copied while nothing changes"

    curvatures[1].averages["G"].update(random_psd(2, 3, seed=9), None)
    refresh.refresh([InversionTask(curvatures[1], 0.1, ["G"])], lambda key: 20)
    fresh = BlockCurvature(curvatures[1].block)
    for matrix, value in curvatures[1].running.items():
        fresh.averages[matrix].update(value, None)
    refresh_inverses([fresh], [0.1], matrices_of(fresh), lambda key: 20)
    assert_close(curvatures[1].solvers["G"].matrix, fresh.solvers["G"].matrix)
    fresh.solvers["A"] = curvatures[1].solvers["A"]  # whose damping has not followed
    expected = precondition(fresh, gradients[1])
    assert_close(precondition_all(together, curvatures, gradients)[1], expected)
    assert storages() == first


@pytest.mark.parametrize("deferred", [False, True])
def test_factors_of_earlier_matrices_are_gone_when_a_large_one_is_inverted(deferred):
    """Large matrices come last in a network. At most 2.3 of the largest; with the others' factors kept, 3.0."""
    sizes = [520] * 4 + [1040]
    layers = [nn.Linear(size, 1, bias=False) for size in sizes]
    blocks = [LinearBlock(f"layer{number}", layer, list(layer.parameters())) for number, layer in enumerate(layers)]
    curvatures = [BlockCurvature(block) for block in blocks]
    for curvature in curvatures:
        for matrix, (_, size) in curvature.block.factor_shapes.items():
            curvature.averages[matrix].update(torch.eye(size)[None].clone(), None)
    refresh = InverseRefresh(deferred)
    refresh.refresh(tasks_for(*curvatures), lambda key: 20)
    with AllocatedBytes() as allocated:
        refresh.refresh(tasks_for(*curvatures), lambda key: 20)
    assert allocated.most < 2.6 * 4 * sizes[-1] ** 2


def test_a_block_that_leaves_a_group_leaves_its_memory():
    """Defect: the matrix whose form did not change held that of the whole group, in every group that one left."""
    curvatures = [kronecker_curvature(name=f"conv{n}") for n in range(4)]
    refresh, together = InverseRefresh(), Preconditioner()
    refresh.refresh(tasks_for(*curvatures), lambda key: 20)
    gradients = [random(curvature.block.num_values, seed=seed) for seed, curvature in enumerate(curvatures)]
    expected = precondition_all(together, curvatures, gradients)
    for leaving in curvatures[:2]:
        refresh.refresh([InversionTask(leaving, 0.1, ["A"])], lambda key: 1)
        assert not leaving.solvers["A"].is_inverse
        assert leaving.solvers["G"].is_inverse
        for actual, before in zip(precondition_all(together, curvatures, gradients), expected, strict=True):
            assert_close(actual, before)
    solvers = [solver.matrix for curvature in curvatures for solver in curvature.solvers.values()]
    storages = {matrix.untyped_storage().data_ptr(): matrix.untyped_storage().nbytes() for matrix in solvers}
    assert sum(storages.values()) == sum(matrix.nbytes for matrix in solvers)

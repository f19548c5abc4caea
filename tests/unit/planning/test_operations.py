"""The operations of a call, counted by hand."""

import pytest
import torch
import torch.nn.functional as F

from kfac_dist.planning.operations import Operation, operations_of


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_a_product_has_two_operations_for_each_term_and_goes_by_its_smallest_dimension():
    (found,) = operations_of(lambda: empty(5, 7) @ empty(7, 3))
    assert found == Operation("product", 2 * 5 * 7 * 3, 3, 1, 5 * 7 + 7 * 3 + 5 * 3)


def test_a_convolution_is_the_product_that_it_stands_for():
    images, weight = empty(2, 4, 10, 10), empty(6, 4, 3, 3)
    (found,) = operations_of(lambda: F.conv2d(images, weight, padding=1))
    assert found.flops == 2 * (2 * 100) * 6 * (4 * 9)
    assert (found.kind, found.size) == ("product", 6)


def test_the_backward_of_a_convolution_is_two_such_products():
    images = empty(2, 4, 10, 10).requires_grad_()
    weight = empty(6, 4, 3, 3).requires_grad_()
    loss = F.conv2d(images, weight, padding=1).sum()
    products = [found for found in operations_of(loss.backward) if found.kind == "product"]
    assert sum(found.flops for found in products) == 2 * 2 * (2 * 100) * 6 * (4 * 9)
    assert {found.size for found in products} == {6}


def test_a_groups_products_are_those_of_its_channels():
    (found,) = operations_of(lambda: F.conv2d(empty(2, 4, 5, 5), empty(4, 1, 3, 3), groups=4))
    assert (found.flops, found.size) == (2 * (2 * 9) * 4 * 9, 1)


def test_cholesky_and_its_solves():
    stack = empty(3, 6, 6)
    (factorise,) = operations_of(lambda: torch.linalg.cholesky_ex(stack))
    assert (factorise.kind, factorise.flops, factorise.size, factorise.matrices) == ("factorise", 3 * 6**3 / 3, 6, 3)
    (solve,) = operations_of(lambda: torch.cholesky_solve(empty(3, 6, 4), stack))
    assert (solve.kind, solve.flops, solve.size, solve.matrices) == ("solve", 2 * 3 * 36 * 4, 6, 3)
    (triangular,) = operations_of(lambda: torch.linalg.solve_triangular(stack, empty(3, 6, 4), upper=False))
    assert (triangular.kind, triangular.flops, triangular.size, triangular.matrices) == ("solve", 3 * 36 * 4, 6, 3)
    (right,) = operations_of(lambda: torch.linalg.solve_triangular(stack, empty(3, 4, 6), upper=False, left=False))
    assert right == triangular


def test_other_operations_move_values():
    first, second = empty(10), empty(10)
    assert operations_of(lambda: first.add_(second)) == [Operation("memory", 0.0, 0, 1, 30)]
    (copied,) = operations_of(lambda: first[:1].expand(10).clone())
    assert copied.values <= 10 + 10, "an expanded tensor has the values that are there"


@pytest.mark.parametrize("call", [lambda: empty(4, 4), lambda: empty(4, 4).T[1:].reshape(-1)[:2].detach()])
def test_views_and_new_memory_cost_nothing(call):
    assert sum(found.values for found in operations_of(lambda: empty(4, 4).view(16)[2:])) == 0
    assert all(found.kind == "memory" for found in operations_of(call))


def test_tensors_with_values_are_none_of_it():
    assert operations_of(lambda: torch.ones(3) @ torch.ones(3)) == []

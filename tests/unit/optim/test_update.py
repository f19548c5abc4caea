"""Eq. 17 (momentum) and Eq. 18 (weight rescaling) against their formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.optim.update import momentum_update_, rescale_weights_, rescaled_weights
from kfac_dist.vocabulary import WeightRescaling


def random_tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def test_momentum_update_by_hand() -> None:
    weight, velocity = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    momentum_update_([weight], [torch.tensor([8.0, 12.0])], [velocity], learning_rate=0.125, momentum=0.5)
    assert velocity.tolist() == [-0.75, 0.5]  # 0.5·v − 0.125·𝒢
    assert weight.tolist() == [0.25, -1.5]


def test_three_steps_equal_the_equation_in_the_weights_alone() -> None:
    (weight,) = random_tensors((3, 2))
    velocity = torch.zeros_like(weight)
    history = [weight.clone(), weight.clone()]  # w(−1) = w(0): the first step has no momentum
    for number, (direction,) in enumerate(random_tensors((3, 2), seed=s) for s in (1, 2, 3)):
        learning_rate, momentum = 0.1 / (number + 1), 0.9 - 0.1 * number
        momentum_update_([weight], [direction], [velocity], learning_rate, momentum)
        w, w_before = history[-1], history[-2]
        history.append(w - learning_rate * direction + momentum * (w - w_before))
        assert_close(weight, history[-1])


def rescale_factor(weight: Tensor, mode: WeightRescaling) -> float:
    factor = math.sqrt(2 * weight.shape[0]) / (math.sqrt(weight.square().sum().item()) + 1e-9)
    return {"always": factor, "cap": min(factor, 1.0), "off": 1.0}[mode]


# Norms before: about 2.4 of a target √6 with the scale 1, well below with 0.1, well above with 10.
@pytest.mark.parametrize("mode", ["always", "cap", "off"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_rescaling_equals_eq_18(mode: WeightRescaling, scale: float) -> None:
    weights = [scale * weight for weight in random_tensors((3, 2), (4, 2, 3, 3), (1, 5))]
    expected = [weight * rescale_factor(weight, mode) for weight in weights]
    rescale_weights_(weights, mode)
    for weight, wanted in zip(weights, expected, strict=True):
        assert_close(weight, wanted)
        if mode == "always":
            assert weight.norm().item() == pytest.approx(math.sqrt(2 * weight.shape[0]), rel=1e-7)


def test_cap_leaves_small_weights_bit_for_bit() -> None:
    small = torch.full((2, 2), 0.25, dtype=torch.float64)  # norm 0.5, target 2
    large = torch.full((2, 2), 2.5, dtype=torch.float64)  # norm 5
    before = small.clone()
    rescale_weights_([small, large], "cap")
    assert torch.equal(small, before)
    assert large.norm().item() == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("mode", ["always", "cap", "off"])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_velocity_is_the_difference_of_the_rescaled_weights(mode: WeightRescaling, scale: float) -> None:
    weights = [scale * weight for weight in random_tensors((3, 2), (4, 2, 3, 3))]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for seed in (1, 2, 3):
        before = [weight.clone() for weight in weights]
        momentum_update_(weights, random_tensors((3, 2), (4, 2, 3, 3), seed=seed), velocities, 0.05, 0.9)
        rescale_weights_(weights, mode, velocities)
        for weight, velocity, old in zip(weights, velocities, before, strict=True):
            assert_close(velocity, weight - old)


def test_a_zero_weight_stays_zero_and_finite() -> None:
    weight, velocity = torch.zeros(2, 3), torch.zeros(2, 3)
    rescale_weights_([weight], "always", [velocity])
    assert weight.tolist() == velocity.tolist() == [[0.0] * 3] * 2


def test_nothing_to_rescale() -> None:
    rescale_weights_([], "always", [])


def test_rescaling_applies_to_weights_of_linear_and_convolution_layers_only() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Linear(2, 3)
    )
    wanted = [model[0].weight, model[1].weight, model[2].weight, model[5].weight]
    assert [id(weight) for weight in rescaled_weights(model)] == [id(weight) for weight in wanted]

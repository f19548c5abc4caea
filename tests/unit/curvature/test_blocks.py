"""Which form of the Fisher each layer gets, and why not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.blocks.identity import IdentityBlock
from kfac_dist.errors import InputError
from tests.small_net import make_kfac
from tests.unit.curvature.layer_factors import random


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.conv = nn.Conv2d(1, 1, 3)
        self.norm = nn.BatchNorm1d(3)
        self.no_affine = nn.BatchNorm2d(3, affine=False)
        self.own = OwnLinear(3, 3)
        self.conv1d = nn.Conv1d(1, 1, 3)
        self.layer_norm = nn.LayerNorm(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied_too = nn.Linear(3, 3, bias=False)
        self.tied_too.weight = self.tied.weight
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.half_frozen_norm = nn.BatchNorm1d(3)
        self.half_frozen_norm.weight.requires_grad_(False)
        self.weight_only = nn.Linear(3, 3)
        self.weight_only.bias.requires_grad_(False)
        self.wholly_frozen = nn.Linear(3, 3).requires_grad_(False)
        self.skipped = nn.ModuleDict({"inner": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
        self.scale = nn.Parameter(torch.ones(1))


def test_every_layer_gets_the_form_or_the_reason_it_should():
    model = Zoo()
    blocks = create_blocks(model, list(model.parameters()), "unit", skip=["skipped.*"])
    assert {block.name: block.form for block in blocks if not isinstance(block, IdentityBlock)} == {
        "linear": "kronecker",
        "conv": "kronecker",
        "norm": "unit",
        "weight_only": "kronecker",
    }
    reasons = {block.name: block.reason for block in blocks if isinstance(block, IdentityBlock)}
    assert reasons.keys() == {
        "(root)",
        "own",
        "conv1d",
        "layer_norm",
        "tied",
        "frozen",
        "half_frozen_norm",
        "skipped.inner",
        "skipped.norm",
    }
    assert "OwnLinear" in reasons["own"]
    assert "Conv1d" in reasons["conv1d"]
    assert "shared" in reasons["tied"]
    assert "frozen" in reasons["frozen"]
    assert "frozen" in reasons["half_frozen_norm"]
    assert reasons["skipped.inner"] == reasons["skipped.norm"] == "skipped by pattern"

    in_blocks = [id(parameter) for block in blocks for parameter in block.parameters]
    assert len(in_blocks) == len(set(in_blocks))
    assert set(in_blocks) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_frozen_bias_is_left_out_of_the_factors():
    blocks = {block.name: block for block in create_blocks(Zoo(), list(Zoo().parameters()), "full")}
    assert blocks == {}  # parameters of another model
    model = Zoo()
    blocks = {block.name: block for block in create_blocks(model, list(model.parameters()), "full")}
    assert blocks["weight_only"].factor_shapes == {"A": (1, 3), "G": (1, 3)}
    assert blocks["linear"].factor_shapes == {"A": (1, 4), "G": (1, 3)}
    assert blocks["norm"].factor_shapes == {"F": (1, 6)}


def test_parameters_that_the_optimizer_was_not_given_get_no_block():
    model = Zoo()
    blocks = create_blocks(model, [model.conv.weight, model.linear.weight, model.linear.bias], "full")
    assert [(block.name, block.num_values) for block in blocks] == [("linear", 12), ("conv", 9)]


# A bias that is registered before the weight


def without_weight_norm(layer):
    remove_weight_norm(weight_norm(layer))


def without_parametrization(layer):
    parametrize.remove_parametrizations(parametrizations.weight_norm(layer), "weight")


def without_pruning(layer):
    prune.identity(layer, "weight")
    prune.remove(layer, "weight")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older weight_norm
@pytest.mark.parametrize(
    ("layer", "strip"),
    [
        (nn.Linear(3, 3), without_weight_norm),
        (nn.Linear(3, 3), without_parametrization),
        (nn.Linear(3, 3), without_pruning),
        (nn.Conv2d(3, 3, 2), without_weight_norm),
        (nn.Conv2d(3, 3, 2), without_pruning),
        (nn.BatchNorm1d(3), without_pruning),
    ],
)
@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
def test_the_order_in_which_a_layer_registered_its_parameters_does_not_matter(layer, form, strip):
    directions = []
    for reordered in (False, True):
        model = nn.Sequential(copy.deepcopy(layer).double())
        for seed, weight in enumerate((model[0].weight, model[0].bias)):
            weight.data = random(*weight.shape, seed=seed)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        if reordered:
            strip(model[0])
            assert list(model[0]._parameters) == ["bias", "weight"]
        optimizer = make_kfac(model, lr=1.0, momentum=0.0, batchnorm=form)
        x = random(4, 3, 4, 4) if isinstance(layer, nn.Conv2d) else random(4, 3)
        (model(x).flatten(1) ** 3).sum(dim=1).mean().backward()
        optimizer.step()
        directions.append({name: weight.detach() - before[name] for name, weight in model.named_parameters()})
    for name, direction in directions[0].items():
        torch.testing.assert_close(directions[1][name], direction, rtol=1e-9, atol=1e-12)


# Layers whose parameters are not a weight and a bias


def reasons_of(layer):
    model = nn.Sequential(layer)
    blocks = create_blocks(model, list(model.parameters()), "unit")
    assert {id(p) for block in blocks for p in block.parameters} == {id(p) for p in model.parameters()}
    return {block.name: block.reason for block in blocks}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_type", [nn.Linear, nn.BatchNorm1d])
def test_a_layer_with_a_further_parameter_is_not_covered(layer_type, bias):
    layer = nn.Linear(4, 4, bias=bias) if layer_type is nn.Linear else nn.BatchNorm1d(4)
    if not bias:
        layer.bias = None
    layer.gain = nn.Parameter(torch.ones(4))
    assert reasons_of(layer) == {"0": "it has parameters that its type does not have: gain"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older weight_norm and spectral_norm
@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_computed_weight_is_given_as_the_reason(wrap):
    reason = "its weight is computed from other parameters: weight_norm, pruning or a parametrization"
    assert reasons_of(wrap(nn.Linear(4, 4)))["0"] == reason


def test_a_computed_bias_is_given_as_the_reason():
    layer = prune.identity(nn.Linear(4, 4), "bias")
    assert reasons_of(layer)["0"].startswith("its bias is computed from other parameters")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
def test_a_layer_without_values_is_not_covered(shape):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(*shape)) if shape[0] else nn.Sequential(nn.Linear(*shape))
    optimizer = make_kfac(model)
    assert optimizer.uncovered[0].reason == "its weight has no values"
    (model(torch.randn(4, 3 if shape[0] else 0)).sum() + model[0].weight.sum()).backward()
    optimizer.step()


def test_a_lazy_layer_is_refused_until_it_knows_its_shapes():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match="0, a LazyLinear, does not know its shapes yet: run one forward"):
        make_kfac(model)
    model(torch.randn(2, 4))
    assert not make_kfac(model).uncovered

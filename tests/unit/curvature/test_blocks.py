"""Which form of the Fisher each layer gets, and why not."""

import torch
from torch import nn

from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.blocks.identity import IdentityBlock


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

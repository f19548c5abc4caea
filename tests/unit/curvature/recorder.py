"""What the tests of the capture share: small models and batches, and a recorder of their factors."""

import torch
from torch import nn

from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.capture import Capture
from kfac_dist.tensors.packing import unpack_symmetric
from tests.unit.curvature.layer_factors import random

TOLERANCE = {"rtol": 1e-10, "atol": 1e-13}


def seeded(model):
    """The model in float64 with weights that depend on their order only."""
    model = model.double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * random(*parameter.shape, seed=seed + 100)
    return model


def small_cnn(inplace=True):
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(4, 3, (3, 2), dilation=(1, 2), bias=False),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(3 * 2 * 4, 5),
            nn.Tanh(),
            nn.Linear(5, 3, bias=False),
        )
    )


def batch(num_samples=6, seed=0):
    labels = torch.randint(3, (num_samples,), generator=torch.Generator().manual_seed(seed))
    return random(num_samples, 2, 7, 6, seed=seed), labels


class Recorder:
    """Captures a model's factors into one tensor each, as `KFAC` does into its buffer."""

    def __init__(self, model, form="full", loss_scale=1.0, only=None):
        self.blocks = create_blocks(model, list(model.parameters()), form)
        self.capture = Capture()
        self.capture.follow(self.blocks)
        self.loss_scale = loss_scale
        self.unfinished = True
        self.raw = {
            (block.name, matrix): torch.full((count * size * (size + 1) // 2,), torch.nan, dtype=torch.float64)
            for block in self.blocks
            for matrix, (count, size) in block.factor_shapes.items()
            if only is None or matrix in only
        }
        self.capture.begin(self.raw)

    @property
    def packed(self):
        """What was captured, with its scale."""
        if self.unfinished:
            self.unfinished = False
            self.capture.finish(self.loss_scale)
        return self.raw

    def matrix(self, name, matrix):
        block = next(block for block in self.blocks if block.name == name)
        return unpack_symmetric(self.packed[name, matrix], *block.factor_shapes[matrix])

    def is_untouched(self):
        return not self.capture.captured and all(value.isnan().all() for value in self.raw.values())


def assert_same(recorder, other):
    assert recorder.packed.keys() == other.packed.keys()
    for key, packed in recorder.packed.items():
        assert packed.isfinite().all(), key
        torch.testing.assert_close(packed, other.packed[key], **TOLERANCE)

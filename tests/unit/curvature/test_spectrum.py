"""The spectrum of a matrix, and those of an optimizer's matrices. One process."""

import math

import pytest
import torch

from kfac_dist.curvature.spectrum import spectrum
from tests.small_net import make_kfac, make_net, train


def test_spectrum_of_known_matrices():
    stack = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([0.0, 1.0]))]).double()
    smallest, largest, rank = spectrum(stack).tolist()
    entropy = -(0.25 * math.log(0.25) * 2 + 0.5 * math.log(0.5))
    assert (smallest, largest) == (0.0, 2.0)
    assert rank == pytest.approx(math.exp(entropy))
    assert spectrum(torch.eye(7)[None])[2].item() == pytest.approx(7)
    ones = torch.ones(1, 5, 5)
    assert spectrum(ones)[2].item() == pytest.approx(1, abs=1e-4)


def test_the_optimizers_spectra_are_those_of_its_running_matrices():
    net = make_net()
    optimizer = make_kfac(net)
    train(net, optimizer, steps=1)
    spectra = optimizer.spectra()
    running = optimizer.state_dict()["kfac"]["blocks"]["4"]["running"]["G"]
    assert spectra["4", "G"] == tuple(spectrum(running).tolist())
    assert len(spectra) == 5

"""Variants of residual networks: where they reduce the image, and how their branches start."""

from __future__ import annotations

from torch import nn

from kfac_dist.errors import InputError
from kfac_dist.models.cifar_resnet import ResidualBlock
from kfac_dist.vocabulary import BottleneckVariant


def set_variant_(model: nn.Module, name: str, variant: BottleneckVariant) -> None:
    """Choose where torchvision's bottleneck ResNets reduce the image, in place.

    v1, as He et al. 2015 describe it: in the first 1x1 convolution of a stage. v1.5, which torchvision builds:
    in its 3x3 convolution. Weights have the same shapes in both.

    Raises:
        InputError: If the model has no such bottlenecks.
    """
    from torchvision.models.resnet import Bottleneck

    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise InputError(f"model.variant must be left out for {name}: only bottleneck ResNets have variants")
    if variant == "v1":
        for block in blocks:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def zero_last_gammas_(model: nn.Module, name: str) -> None:
    """Set the scale of each residual branch's last BatchNorm to zero, so that blocks start as the identity.

    Raises:
        InputError: If the model has no residual blocks of the known kinds.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    found = False
    for module in model.modules():
        if isinstance(module, Bottleneck | BasicBlock | ResidualBlock):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)
            found = True
    if not found:
        raise InputError(f"model.zero_init_last_gamma must be false for {name}, which is not a ResNet")

"""Networks by name, initialised alike on every rank."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from kfac_dist.errors import InputError
from kfac_dist.models.batchnorm import SlotwiseBatchNorm
from kfac_dist.models.cifar_resnet import CifarResNet
from kfac_dist.models.residual import set_variant_, zero_last_gammas_
from kfac_dist.models.small import alexnet32, digits_cnn
from kfac_dist.vocabulary import BottleneckVariant

__all__ = ["SlotwiseBatchNorm", "available_models", "create_model"]

_CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56)}
# The auxiliary classifiers would make these two return more than logits; their own initialisation is slow and
# replaced.
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": False}
_TORCHVISION_SETTINGS = {"googlenet": _WITHOUT_AUXILIARY, "inception_v3": _WITHOUT_AUXILIARY}


def available_models() -> list[str]:
    """Names that `create_model` takes: this package's networks, then torchvision's classifiers."""
    return ["digits_cnn", *_CIFAR_RESNETS, "alexnet32", *_torchvision_classifiers()]


def create_model(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
    variant: BottleneckVariant | None = None,
    zero_init_last_gamma: bool = False,
) -> nn.Module:
    """Build and initialise a network; the same weights for the same arguments, in float32 on the CPU.

    Weights of convolutions and linear layers are drawn from N(0, 2 / fan_in) (HeNormal) and their biases are
    zero; BatchNorm starts at scale 1 and shift 0. Anything else keeps its module's own initialisation.

    Args:
        name: One of `available_models()`.
        num_classes: Outputs, > 0.
        image_shape: (channels, height, width) of the images.
        seed: Of the initial weights, >= 0.
        variant: Where a bottleneck ResNet reduces the image: in the first 1x1 convolution of a stage (v1) or
            in its 3x3 convolution (v1.5, as without this argument).
        zero_init_last_gamma: Whether a ResNet's blocks start as the identity.

    Raises:
        InputError: If there is no such model, it cannot take such images, or has no such variant.
    """
    build = _builder(name, num_classes, image_shape)
    if variant is not None:
        build = partial(_build_variant, build, name, variant)
    with torch.random.fork_rng(devices=[]):
        _check_takes_images(name, build, num_classes, image_shape)
        torch.manual_seed(seed)  # for what some torchvision models draw and `_initialise_` leaves alone
        model = build()
    _initialise_(model, torch.Generator().manual_seed(seed))
    if zero_init_last_gamma:
        zero_last_gammas_(model, name)
    return model


def _build_variant(build: Callable[[], nn.Module], name: str, variant: BottleneckVariant) -> nn.Module:
    model = build()
    set_variant_(model, name, variant)
    return model


def _builder(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    if name == "digits_cnn":
        return partial(digits_cnn, num_classes, image_shape)
    if name == "alexnet32":
        return partial(alexnet32, num_classes, image_shape)
    if name in _CIFAR_RESNETS:
        return partial(CifarResNet, _CIFAR_RESNETS[name], num_classes, image_shape[0])
    if name in _torchvision_classifiers():
        from torchvision.models import get_model

        settings = _TORCHVISION_SETTINGS.get(name, {})
        return partial(get_model, name, weights=None, num_classes=num_classes, **settings)
    close = difflib.get_close_matches(name, available_models(), n=5, cutoff=0.5)
    raise InputError(
        f"model.name must be a known model, got {name!r}"
        + (f"; close to it: {', '.join(close)}" if close else "")
        + ". To list all: "
        + 'python -c "from kfac_dist.models import available_models; print(*available_models())"'
    )


def _check_takes_images(
    name: str, build: Callable[[], nn.Module], num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Refuse a network whose forward pass fails on the images or returns something else than logits."""
    problem = ""
    try:
        with torch.device("meta"), torch.no_grad():  # shapes only: no memory, no arithmetic
            logits = build()(torch.empty(2, *image_shape))
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        problem = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    else:
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
            problem = "it returns something else than one logit for each class"
    if problem:
        shape = "x".join(str(size) for size in image_shape)
        raise InputError(
            f"model.name {name} must take the data's images of {shape} (channels x height x width), and does "
            f"not: {problem}. Choose a model made for this image size, or other data"
        )


def _initialise_(model: nn.Module, generator: torch.Generator) -> None:
    """HeNormal (He et al. 2015) for convolutions and linear layers, identity for BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2.0 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if module.affine:
                nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _torchvision_classifiers() -> list[str]:
    from torchvision import models  # slow to import, and this package's own networks do without

    return sorted(models.list_models(module=models))

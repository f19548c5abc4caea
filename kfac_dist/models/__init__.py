"""Networks by name, initialised alike on every rank."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from kfac_dist.config.entry_points import MODELS, installed_names, load_registered, takes
from kfac_dist.errors import InputError
from kfac_dist.models.batchnorm import SlotwiseBatchNorm
from kfac_dist.models.cifar_resnet import CifarResNet
from kfac_dist.models.residual import set_variant_, zero_last_gammas_
from kfac_dist.models.small import alexnet32, digits_cnn
from kfac_dist.vocabulary import BottleneckVariant, Initialization

__all__ = ["SlotwiseBatchNorm", "available_models", "create_model"]

Build = Callable[[int, tuple[int, int, int]], nn.Module]
"""Makes a network from the number of classes and (channels, height, width) of the images."""


def _cifar_resnet(depth: int, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return CifarResNet(depth, num_classes, image_shape[0])


# A row for each network of this package; one's own comes from an installed package (docs/own-data-and-models.md).
_NETWORKS: dict[str, Build] = {
    "digits_cnn": digits_cnn,
    **{f"resnet{depth}": partial(_cifar_resnet, depth) for depth in (8, 20, 32, 44, 56)},
    "alexnet32": alexnet32,
}


def available_models() -> list[str]:
    """Names that `create_model` takes: this package's networks, torchvision's classifiers, installed packages'."""
    return [*_NETWORKS, *_torchvision_classifiers(), *installed_names(MODELS)]


def create_model(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
    variant: BottleneckVariant | None = None,
    zero_init_last_gamma: bool = False,
    initialization: Initialization | None = None,
) -> nn.Module:
    """Build and initialise a network; the same weights for the same arguments, in float32 on the CPU.

    The recipes' initialization: weights of convolutions and linear layers are drawn from N(0, 2 / fan_in) (HeNormal)
    and their biases are zero; BatchNorm starts at scale 1 and shift 0. Anything else keeps its module's own.

    Args:
        name: One of `available_models()`.
        num_classes: Outputs, > 0.
        image_shape: (channels, height, width) of the images.
        seed: Of the initial weights, >= 0.
        variant: Where a bottleneck ResNet reduces the image: in the first 1x1 convolution of a stage (v1) or
            in its 3x3 convolution (v1.5, as without this argument).
        zero_init_last_gamma: Whether a ResNet's blocks start as the identity.
        initialization: ``recipe``, or ``own``: the weights that the network's constructor gives. None means own for
            networks of installed packages, recipe for all others.

    Raises:
        InputError: If there is no such model, it cannot take such images, or has no such variant.
    """
    own = _own_builder(name)
    initialization = initialization or ("recipe" if own is None else "own")
    build = partial(own or _builder(name, initialization), num_classes, image_shape)
    if variant is not None:
        build = partial(_build_variant, build, name, variant)
    with torch.random.fork_rng(devices=[]):
        # torchvision's networks may be large: shapes only. This package's are computed sooner than the meta device is
        # ready, which loads torch's compiler for them; and one's own may compute in its constructor.
        device = "cpu" if own is not None or name in _NETWORKS else "meta"
        _check_takes_images(name, build, num_classes, image_shape, device)
        torch.manual_seed(seed)  # for what `_initialise_` leaves alone
        model = build()
    if initialization == "recipe":
        _initialise_(model, torch.Generator().manual_seed(seed))
    if zero_init_last_gamma:
        zero_last_gammas_(model, name)
    return model


def _build_variant(build: Callable[[], nn.Module], name: str, variant: BottleneckVariant) -> nn.Module:
    model = build()
    set_variant_(model, name, variant)
    return model


def _builder(name: str, initialization: Initialization) -> Build:
    if name in _NETWORKS:
        return _NETWORKS[name]
    if name in _torchvision_classifiers():
        return partial(_torchvision_model, name, initialization)
    close = difflib.get_close_matches(name, available_models(), n=5, cutoff=0.5)
    raise InputError(
        f"model.name must be a known model, got {name!r}"
        + (f"; close to it: {', '.join(close)}" if close else "")
        + ". To list all: "
        + 'python -c "from kfac_dist.models import available_models; print(*available_models())"'
    )


def _own_builder(name: str) -> Build | None:
    """The function that an installed package registers; None where none does."""
    built_in = [*_NETWORKS, *_torchvision_classifiers()] if name in installed_names(MODELS) else []
    registered = load_registered(MODELS, "model.name", name, built_in)
    if registered is None:
        return None
    function = registered.value
    rule = "a function (num_classes, image_shape) that returns a torch.nn.Module"
    if not callable(function) or not takes(function, 2):
        raise registered.refuse(rule, repr(function))

    def build(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        model = function(num_classes, image_shape)
        if not isinstance(model, nn.Module):
            raise registered.refuse(rule, f"one that returns {type(model).__name__}")
        return model

    return build


def _torchvision_model(
    name: str, initialization: Initialization, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    from torchvision.models import get_model

    del image_shape  # they take three channels
    settings = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary classifiers would make them return more than logits; their own initialization is slow.
        settings = {"aux_logits": False, "init_weights": initialization == "own"}
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **settings)
    return model


def _check_takes_images(
    name: str, build: Callable[[], nn.Module], num_classes: int, image_shape: tuple[int, int, int], device: str
) -> None:
    """Refuse a network whose forward pass fails on the images or returns something else than logits."""
    problem = ""
    try:
        with torch.device(device), torch.no_grad():
            logits = build()(torch.empty(2, *image_shape))
    except InputError:
        raise
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

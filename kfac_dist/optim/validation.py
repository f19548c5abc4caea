"""Checks of the optimizers' settings: what is out of range is refused by name, on every rank alike."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, get_args

from torch import Tensor
from torch.nn import Parameter

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.optim.loss_scale import LossScaler
from kfac_dist.vocabulary import WeightRescaling


def check(name: str, allowed: bool, value: object, rule: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: If it is not allowed.
    """
    if not allowed:
        raise ValueError(f"{name} must be {rule}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    check(name, value in choices, repr(value), "one of " + ", ".join(choices))


def is_count(value: object) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, int) and value is not True and value >= 1


def is_number(value: object) -> bool:
    """Whether it is a finite number, be it a tensor's, as a learning rate may be."""
    return type(value) is not bool and isinstance(value, Real | Tensor) and math.isfinite(value)


def check_parameters(given: Sequence[Parameter], blocks: Sequence[Block]) -> None:
    """Refuse parameters that are not the model's, that lie on several devices, or none that are trained."""
    check("params", bool(blocks), f"{len(given)} parameters", "trainable parameters of the model")
    covered = {id(parameter) for block in blocks for parameter in block.parameters}
    foreign = [tuple(p.shape) for p in given if p.requires_grad and id(p) not in covered]
    check("params", not foreign, f"others too, of shapes {foreign}", "parameters of the model")
    devices = dict.fromkeys(str(parameter.device) for block in blocks for parameter in block.parameters)
    rule = "on one device (give what lies on another to an optimizer of its own)"
    check("params", len(devices) <= 1, " and ".join(devices), rule)


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    check(name, is_number(value) and value > 0, repr(value), "a number > 0")  # '0.5' would read like a number


def check_max_norm(max_grad_norm: Any) -> None:
    """Refuse a norm to clip to that is not positive."""
    is_norm = isinstance(max_grad_norm, Real) and max_grad_norm is not True and float(max_grad_norm) > 0
    check("max_grad_norm", max_grad_norm is None or is_norm, repr(max_grad_norm), "a number > 0, or None not to clip")


def check_loss_scaler(loss_scaler: object) -> None:
    """Refuse another thing than our own loss scaler, such as torch's."""
    rule = "a kfac_dist.LossScaler, or None for losses that are not scaled"
    check("loss_scaler", loss_scaler is None or isinstance(loss_scaler, LossScaler), repr(loss_scaler), rule)


def check_sample_fraction(sample_fraction: object, num_samples: int | None) -> None:
    """Refuse a share of the samples that is no number in (0, 1], or that would do nothing."""
    is_share = sample_fraction is not True and isinstance(sample_fraction, Real) and 0 < float(sample_fraction) <= 1
    check("sample_fraction", is_share, repr(sample_fraction), "a number in (0, 1]")
    rule = "1 where num_samples is given, as the samples may then lie in any dimension and all are taken"
    check("sample_fraction", num_samples is None or sample_fraction == 1, sample_fraction, rule)


def check_kfac_group(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group of K-FAC with a setting out of range."""
    for name in ("lr", "weight_decay"):
        check(name, is_number(group[name]) and group[name] >= 0, repr(group[name]), "a number ≥ 0")
    for name in ("damping", "batchnorm_damping_ratio"):
        check_positive(name, group[name])
    momentum = group["momentum"]
    check("momentum", is_number(momentum) and 0 <= momentum < 1, repr(momentum), "a number in [0, 1)")
    check_choice("weight_rescaling", group["weight_rescaling"], get_args(WeightRescaling))


def check_order(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state whose parameters are in another order, by which torch gives each its momentum.

    Args:
        groups: The optimizer's parameter groups.
        saved_groups: The state's.

    Raises:
        ValueError: Naming the first parameter that is in another's place.
    """
    for group, saved in zip(groups, saved_groups, strict=False):
        for here, there in zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False):
            if here != there:
                raise ValueError(
                    f"the state's parameters are in another order than this optimizer's: {there} in the place of "
                    f"{here}. Build the model's layers, or the groups, in the same order before load_state_dict"
                )

"""Checks of the optimizers' settings: what is out of range is refused by name, on every rank alike."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from kfac_dist.optim.update import WeightRescaling


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


def check_count(name: str, value: object, rule: str = "an integer ≥ 1") -> None:
    """Refuse what is no positive integer."""
    check(name, isinstance(value, int) and value >= 1, value, rule)


def check_kfac_group(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group of K-FAC with a setting out of range."""
    for name, allowed, rule in (
        ("lr", group["lr"] >= 0, "≥ 0"),
        ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
        ("damping", group["damping"] > 0, "> 0"),
        ("batchnorm_damping_ratio", group["batchnorm_damping_ratio"] > 0, "> 0"),
        ("weight_decay", group["weight_decay"] >= 0, "≥ 0"),
    ):
        check(name, allowed, group[name], rule)
    check_choice("weight_rescaling", group["weight_rescaling"], get_args(WeightRescaling))

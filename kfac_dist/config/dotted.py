"""Dotted keys of nested mappings, such as ``kfac.damping.initial``."""

from collections.abc import Mapping
from typing import Any

from kfac_dist.errors import InputError


def leaves(value: object, key: str = "") -> dict[str, object]:
    """Every value of nested mappings by its dotted key."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        path: leaf
        for name, inner in value.items()
        for path, leaf in leaves(inner, f"{key}.{name}" if key else str(name)).items()
    }


def value_at(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is missing."""
    value: Any = settings
    for name in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def section_of_(settings: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """The mapping that a dotted key stands in; it is made where it is missing, as are those that it stands in.

    Args:
        settings: Nested mappings.
        key: Dotted.
        source: Whose key it is, with which a message begins.

    Raises:
        InputError: If a part of the key before the last is a value.
    """
    names = key.split(".")[:-1]
    section = settings
    for depth, name in enumerate(names, start=1):
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise InputError(f"{source}: {'.'.join(names[:depth])} is a value, not a section")
        section = inner
    return section

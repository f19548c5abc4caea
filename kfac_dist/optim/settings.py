"""An optimizer's settings are no attributes of it: to assign one is refused, since Python would keep it unread."""

import inspect
from functools import partial
from typing import Any, TypeVar

import torch

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def refuse_as_attributes(kind: type[_Optimizer]) -> type[_Optimizer]:
    """A class decorator: assigning a keyword of the constructor raises AttributeError, which says where it counts.

    Exempt are attributes that the class declares.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        is_declared = hasattr(kind, name) or name in kind.__annotations__
        if parameter.kind is parameter.KEYWORD_ONLY and not is_declared:
            setattr(kind, name, property(partial(_raise, name), partial(_raise, name)))
    return kind


def _raise(name: str, optimizer: torch.optim.Optimizer, value: Any = None) -> None:
    kind = type(optimizer).__name__
    if name in getattr(optimizer, "defaults", ()):
        remedy = f"it is a setting of each parameter group: for group in optimizer.param_groups: group[{name!r}] = …"
    else:
        remedy = f"it is an argument of the constructor, {kind}(…, {name}=…), and stays what it is"
    if name == "refresh":
        remedy += (
            "; for an interval that changes give refresh=IntervalRefresh(function of the iteration), from "
            "kfac_dist.curvature.refresh_schedule"
        )
    raise AttributeError(f"{kind} has no attribute {name!r}: {remedy}")

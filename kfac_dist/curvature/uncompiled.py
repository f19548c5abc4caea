"""Importing this module loads the compiler and keeps it out of the classes that `not_compiled` decorates."""

from collections.abc import Callable

import torch

from kfac_dist.curvature.hook_classes import HOOK_CLASSES

_REASON = "K-FAC's hooks cannot be part of a graph (fullgraph=False)"

for hook_class in HOOK_CLASSES:
    hook_class.__call__ = torch.compiler.disable(hook_class.__call__, reason=_REASON)


def _call(hook: Callable[..., None], *arguments: object) -> None:
    hook(*arguments)


call = torch.compiler.disable(_call, reason=_REASON)
"""``call(hook, *arguments)``: what a hook does that is being traced already. The graph of its model ends before it."""

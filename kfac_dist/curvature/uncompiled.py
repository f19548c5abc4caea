"""Importing this module loads the compiler and keeps it out of the classes that `not_compiled` decorates."""

import torch

from kfac_dist.curvature.hook_classes import HOOK_CLASSES

_REASON = "K-FAC's hooks cannot be part of a graph (fullgraph=False)"

for hook_class in HOOK_CLASSES:
    hook_class.__call__ = torch.compiler.disable(hook_class.__call__, reason=_REASON)


def _do_nothing() -> None:
    pass


break_graph = torch.compiler.disable(_do_nothing, reason=_REASON)
"""What a hook calls that is being traced already: the model's graph ends before it, and it is called as it now is."""

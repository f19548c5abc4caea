"""Which classes of hooks `torch.compile` is to leave alone."""

from typing import Any, TypeVar

_C = TypeVar("_C", bound=type[Any])

HOOK_CLASSES: list[type[Any]] = []


def not_compiled(hook_class: _C) -> _C:
    """Class decorator for a callable hook: the compiler, once it is loaded, is to leave its `__call__` alone.

    Traced, it would be compiled anew for each layer's name, which is limited. `torch.compiler.disable` itself loads
    the compiler, and that takes as long as training some small networks. So it is left to
    `kfac_dist.curvature.uncompiled`, which `__call__` has to import where `torch.compiler.is_compiling()`, that is
    while a compiled model is traced for the first time.
    """
    HOOK_CLASSES.append(hook_class)
    return hook_class

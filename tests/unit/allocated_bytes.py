"""How much memory tensors take."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within its ``with`` block.

    Attributes:
        most: At any time, of those that are there.
        total: Of all, those included that are gone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, int] = {}
        self.most = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):  # it was there before
            self._know(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._know(storage, storage.nbytes())
        return result

    def _know(self, storage: UntypedStorage, num_bytes: int) -> None:
        if storage._cdata not in self._live:
            self._live[storage._cdata] = num_bytes
            weakref.finalize(storage, self._live.pop, storage._cdata, 0)
            self.total += num_bytes
            self.most = max(self.most, sum(self._live.values()))


def _storages(values: object) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

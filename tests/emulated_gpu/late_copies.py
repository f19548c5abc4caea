"""Asynchronous copies between a GPU and page-locked memory of the host, as late as they may be."""

import threading
from typing import Any

import torch
from torch import Tensor


class LateCopies:
    """Copies that were started and are not known to have ended.

    One to the host leaves nonsense there until it is waited for; of one from the host it is found out whether its
    source was changed before. All streams count as one: what an event has recorded are all copies before it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._number = 0
        self._to_host: list[tuple[int, Tensor, Tensor]] = []  # number, where to, values
        self._from_host: list[tuple[int, Tensor, Tensor]] = []  # number, source, its values when the copy was started

    def install(self) -> None:
        """Copies end when an event, a stream or the device is waited for."""
        event, stream = torch.cuda.Event, torch.cuda.Stream
        record, synchronize, query = event.record, event.synchronize, event.query
        synchronize_stream, synchronize_device = stream.synchronize, torch.cuda.synchronize

        def record_here(self: Any, *args: Any, **kwargs: Any) -> None:
            self.copies_before = late._number
            self.times_asked = 0
            record(self, *args, **kwargs)

        def synchronize_here(self: Any) -> None:
            late.finish(getattr(self, "copies_before", 0))
            synchronize(self)

        def query_here(self: Any) -> bool:
            """False the first two times."""
            self.times_asked = getattr(self, "times_asked", 0) + 1
            if self.times_asked <= 2 and late._is_pending(getattr(self, "copies_before", 0)):
                return False
            late.finish(getattr(self, "copies_before", 0))
            return bool(query(self))

        def synchronize_stream_here(self: Any) -> None:
            late.finish()
            synchronize_stream(self)

        def synchronize_device_here(device: Any = None) -> None:
            late.finish()
            synchronize_device(device)

        late = self
        event.record, event.synchronize, event.query = record_here, synchronize_here, query_here  # type: ignore
        stream.synchronize, torch.cuda.synchronize = synchronize_stream_here, synchronize_device_here  # type: ignore

    def write(self, into: Tensor, values: Tensor) -> None:
        """Start to copy to the host."""
        with self._lock, torch.no_grad():
            self._number += 1
            self._to_host.append((self._number, into.detach(), values.clone()))
            into.detach().fill_(float("nan") if into.is_floating_point() else 1)

    def read(self, source: Tensor) -> None:
        """Start to copy from the host."""
        with self._lock, torch.no_grad():
            self._number += 1
            self._from_host.append((self._number, source.detach(), source.detach().clone()))

    def finish(self, up_to: int | None = None) -> None:
        """End all copies, or the first ones.

        Raises:
            RuntimeError: If the source of one has changed.
        """
        with self._lock, torch.no_grad():
            up_to = self._number if up_to is None else up_to
            for number, into, values in self._to_host:
                if number <= up_to:
                    into.copy_(values)
            ended = [copy for copy in self._from_host if copy[0] <= up_to]
            self._to_host = [copy for copy in self._to_host if copy[0] > up_to]
            self._from_host = [copy for copy in self._from_host if copy[0] > up_to]
            for _, source, values in ended:
                if not torch.equal(_bytes(source), _bytes(values)):
                    raise RuntimeError(
                        f"page-locked memory {tuple(source.shape)} has changed before its copy was waited for"
                    )

    def _is_pending(self, up_to: int) -> bool:
        return any(copy[0] <= up_to for copy in [*self._to_host, *self._from_host])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)

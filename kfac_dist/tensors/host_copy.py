"""Tensors between host and device: small ones without making either wait for the other, many for a checkpoint.

Ordinary copies wait: to a GPU the host for the copy, from a GPU for all work before it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the tensor itself where that is the host."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device tensor's values on the host, on their way."""

    def __init__(self, tensor: Tensor) -> None:
        """Start copying what the tensor holds once all work queued before is done."""
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        # The copy went there, whichever device is torch's current one.
        self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class HostSnapshot:
    """Copies of many tensors on the host, in memory that the next snapshot uses again.

    A copy into new memory takes several times as long, because the system hands it out page by page; memory that a GPU
    copies into is locked, which takes longer still.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors; returns when all have arrived.

        Args:
            tensors: By name, of any shape and on any device.

        Returns:
            Copies on the CPU by name, which hold until the next call. Memory of names that are no more is released.
        """
        memory: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors.items():
            is_remote = tensor.device.type == "cuda"
            known = self._memory.get(name)
            if known is None or not _alike(known, tensor) or known.is_pinned() != is_remote:
                known = torch.empty_like(tensor, device="cpu", pin_memory=is_remote, requires_grad=False)
            memory[name] = known.copy_(tensor.detach(), non_blocking=is_remote)
            if is_remote:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._memory = memory
        return dict(memory)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()

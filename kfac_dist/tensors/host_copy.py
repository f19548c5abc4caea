"""Small tensors between host and device without making either wait for the other.

Ordinary copies do: to a GPU the host waits for the copy, from a GPU for all work before it.
"""

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
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        # The copy went there, whichever device is torch's current one.
        self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

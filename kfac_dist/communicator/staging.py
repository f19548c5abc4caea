"""How a GPU's buffers reach MPI: directly where the library is CUDA-aware, else through pinned host memory."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kfac_dist.errors import InputError

CUDA_AWARE_VARIABLE = "KFAC_DIST_CUDA_AWARE_MPI"
WHOLE = slice(None)
NOTHING = slice(0, 0)

_SMALLEST_BYTES = 4096


def is_cuda_aware() -> bool:
    """Whether the MPI library takes device buffers: what it says of itself, or what KFAC_DIST_CUDA_AWARE_MPI says.

    `mpi4py.MPI` must have been imported. Asks the library itself: `ompi_info` of a build without CUDA lists cuda too.

    Raises:
        InputError: If the variable is neither 0 nor 1.
    """
    said = os.environ.get(CUDA_AWARE_VARIABLE, "")
    if said not in ("", "0", "1"):
        raise InputError(f"{CUDA_AWARE_VARIABLE} must be 0 or 1, or not set to ask the MPI library, got {said!r}")
    return said == "1" if said else _library_is_cuda_aware()


@cache
def _library_is_cuda_aware() -> bool:
    for name in (None, *_loaded_mpi_libraries()):  # the process's global symbols first
        try:
            query = ctypes.CDLL(name).MPIX_Query_cuda_support
        except (AttributeError, OSError):
            continue
        return int(query()) == 1
    return False


def _loaded_mpi_libraries() -> list[str]:
    """Paths of the MPI libraries in this process: mpi4py loads its own without making its symbols global."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith("libmpi") and ".so" in Path(path).name)


class Staging:
    """Host buffers that stand in for device tensors; each is kept, in its size class, and used again.

    Pinned memory is slow to allocate and several times faster to copy from than other host memory.
    """

    def __init__(self, pin_memory: bool = True) -> None:
        """Set up.

        Args:
            pin_memory: False only where there is no CUDA device, for tests.
        """
        self._pin_memory = pin_memory
        self._free: dict[int, list[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self.num_allocated = 0

    @contextmanager
    def staged(self, tensor: Tensor, fetch: slice, store: slice) -> Iterator[Tensor]:
        """A host tensor to use in place of a device tensor.

        Args:
            tensor: Contiguous.
            fetch: Which of its flattened values the host tensor starts with; the others are arbitrary.
            store: Which values are copied back at the end, in the order of the current stream.

        Yields:
            A host tensor of the same shape and dtype.
        """
        assert tensor.is_contiguous()
        tensor = tensor.detach()
        memory = self._borrow(tensor.numel() * tensor.element_size())
        host = memory[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        flat = tensor.view(-1)
        if flat[fetch].numel():
            host[fetch].copy_(flat[fetch], non_blocking=True)
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()
        yield host.view(tensor.shape)
        flat[store].copy_(host[store], non_blocking=True)
        event = None
        if tensor.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(tensor.device))
        self._free[len(memory)].append((memory, event))

    def _borrow(self, num_bytes: int) -> Tensor:
        """Bytes that nothing else uses: a power of two of them."""
        size = max(_SMALLEST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        if not free:
            self.num_allocated += 1
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pin_memory)
        memory, last_copy = free.pop()
        if last_copy is not None:
            last_copy.synchronize()  # it may still be on its way to the device
        return memory

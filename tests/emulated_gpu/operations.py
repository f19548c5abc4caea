"""Carries out the operations on an emulated GPU's tensors, on the CPU and over the same memory."""

import ctypes
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.emulated_gpu.late_copies import LateCopies

CPU = torch.device("cpu")

# What torch itself does without a kernel: it allocates, describes or communicates.
_NEW = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"}
_NATIVE = {"set_", "resize_", "record_stream", "is_pinned", "_pin_memory", "detach", "detach_", "alias", "lift_fresh"}
_NATIVE_NAMESPACES = {"prim", "prims", "c10d"}

_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
_INDEXING = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operations whose result's size, or value on the host, depends on values on the device.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}

_late = LateCopies()


def install() -> None:
    """Take over this process."""
    enter_in_threads()
    _late.install()
    torch.cuda._sleep = _sleep
    torch._tensor_str._str = _shown_from_host(torch._tensor_str._str)  # type: ignore[attr-defined]
    EmulatedGpu().__enter__()


def enter_in_threads() -> None:
    """Threads that Python starts carry out operations likewise; those of torch's autograd do already."""
    run = threading.Thread.run

    def run_within(self: threading.Thread) -> None:
        with EmulatedGpu():
            run(self)

    threading.Thread.run = run_within  # type: ignore[method-assign]


class EmulatedGpu(TorchDispatchMode):
    """Sees every operation below autograd and autocast."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None
        if not on_gpu and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if name in _NATIVE or func.is_view or func.namespace in _NATIVE_NAMESPACES:
            return func(*args, **kwargs)
        if name in _NEW:
            return _with_garbage(func(*args, **kwargs))
        _check_devices(func, name, tensors, on_gpu)
        if name in _COPIES and _copy(name, args, kwargs, tensors, device):
            return None if name == "_foreach_copy_" else args[0]
        if name in _WAITING or (name in _INDEXING and _has_mask(args)):
            wait(name)
        return _carry_out(func, name, args, kwargs, on_gpu, device)


def wait(reason: str) -> None:
    """The host waits for the device; said as torch says it in the mode that finds such places."""
    _late.finish()
    level = torch.cuda.get_sync_debug_mode()
    if level:
        text = f"called a synchronizing CUDA operation: {reason}"
        if level == 2:
            raise RuntimeError(text)
        warnings.warn(text, stacklevel=2)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor's memory as one of the CPU."""
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=CPU)
    if storage.nbytes():
        memory = torch.frombuffer(
            (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8
        )
    view = torch.empty(0, dtype=tensor.dtype, device=CPU)
    return view.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _on_gpu(result: Tensor, device: torch.device) -> Tensor:
    overlaps = any(stride == 0 and size > 1 for size, stride in zip(result.size(), result.stride(), strict=True))
    strides = torch.empty(result.size(), device="meta").stride() if overlaps else result.stride()
    moved = torch.empty_strided(result.size(), strides, dtype=result.dtype, device=device)
    on_host(moved).copy_(result)
    return moved


def _with_garbage(tensor: Tensor) -> Tensor:
    """New memory as it may be: nan."""
    if tensor.is_cuda and tensor.numel():
        storage = tensor.untyped_storage()
        ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
    return tensor


def _check_devices(func: Any, name: str, tensors: list[Tensor], on_gpu: list[Tensor]) -> None:
    """Refuse what a GPU refuses: tensors of several devices, but for scalars and indices of the CPU."""
    if name in _COPIES or not on_gpu:
        return
    strangers = [tensor for tensor in tensors if not tensor.is_cuda and tensor.dim() > 0]
    if name in _INDEXING and tensors[0].is_cuda:
        strangers = [tensor for tensor in strangers if tensor.is_floating_point()]
    changes_first = name.endswith("_") and not name.startswith("_foreach")
    if strangers or len({tensor.device for tensor in on_gpu}) > 1 or (changes_first and not tensors[0].is_cuda):
        devices = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {devices}")


def _has_mask(args: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tree_leaves(args[1]) if tensor is not None)


def _copy(name: str, args: Any, kwargs: Any, tensors: list[Tensor], device: torch.device | None) -> bool:
    """Look after a copy between devices; whether it is done, or will be."""
    if name == "_to_copy":
        source = tensors[0]
        if device is None or device.type == source.device.type:
            return False
        if not kwargs.get("non_blocking") or source.is_cuda:  # an asynchronous copy into a new tensor of the host
            wait("a copy to another device")
        elif source.is_pinned():
            _late.read(source)
        else:
            wait("a copy from pageable memory")
        return False
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    pairs = [(args[0], args[1])] if name == "copy_" else list(zip(args[0], args[1], strict=True))
    between = [(into, source) for into, source in pairs if into.is_cuda != source.is_cuda]
    for into, source in between:
        if not non_blocking or not (source if into.is_cuda else into).is_pinned():
            wait("a copy between the host's pageable memory and the device" if non_blocking else "a blocking copy")
        elif into.is_cuda:
            _late.read(source)
        else:
            _late.write(into, on_host(source.detach()))
    is_late = bool(between) and non_blocking and not between[0][0].is_cuda and between[0][0].is_pinned()
    assert not is_late or len(between) == len(pairs), "copies of several kinds at once are not emulated"
    return is_late


def _carry_out(func: Any, name: str, args: Any, kwargs: Any, on_gpu: list[Tensor], device: torch.device | None) -> Any:
    """Call the operation with the CPU's views of all tensors, and move what is new to the device."""
    views: dict[int, tuple[Tensor, Tensor]] = {}  # by the device's tensor, which is kept alive

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            return views.setdefault(id(leaf), (leaf, on_host(leaf)))[1]
        if isinstance(leaf, torch.device):
            return CPU
        if isinstance(leaf, torch.Generator) and leaf.device.type == "cuda":
            raise NotImplementedError("generators of an emulated GPU")
        return leaf

    host_args, host_kwargs = tree_map(replaced, (args, kwargs))
    result = _emulated(func, name, host_args, host_kwargs)
    for argument in func._schema.arguments:  # out=, which the CPU may have given other memory
        into = kwargs.get(argument.name)
        if isinstance(into, Tensor) and into.is_cuda and host_kwargs[argument.name].shape != into.shape:
            on_host(into.resize_(host_kwargs[argument.name].shape)).copy_(host_kwargs[argument.name])
    given = {id(view): tensor for tensor, view in views.values()}
    goes_to = device if device is not None else on_gpu[0].device

    def returned(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or goes_to.type != "cuda":
            return leaf
        return given[id(leaf)] if id(leaf) in given else _on_gpu(leaf, goes_to)

    return tree_map(returned, result)


def _emulated(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The operation, or what stands for it where the CPU has none."""
    if name in ("mm", "bmm") and func._overloadname == "dtype":  # out_dtype
        left, right, dtype = args
        is_half = left.dtype in (torch.float16, torch.bfloat16)
        if left.dtype != right.dtype or dtype not in (left.dtype, torch.float32 if is_half else left.dtype):
            raise RuntimeError(
                f"{func} of {left.dtype} and {right.dtype} to {dtype}: input dtypes must be the same, and "
                "out_dtype theirs, or fp32 for fp16 and bf16"
            )
        return getattr(torch, name)(left.to(dtype), right.to(dtype))
    if name == "batch_norm_stats":
        x, eps = args
        values = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
        return values.mean(dim=1), (values.var(dim=1, correction=0) + eps).rsqrt()
    if name in ("native_batch_norm", "cudnn_batch_norm"):  # the CPU wants one precision for fp16
        output, *saved = torch.ops.aten.native_batch_norm(_without_half(args[0]), *args[1:])
        reserve = (torch.empty(0, dtype=torch.uint8, device=CPU),) if name == "cudnn_batch_norm" else ()
        return output.to(args[0].dtype), *saved, *reserve
    if name == "native_batch_norm_backward":
        gradient, *others = func(_without_half(args[0]), _without_half(args[1]), *args[2:])
        return gradient.to(args[1].dtype), *others
    if name == "cudnn_batch_norm_backward":
        x, g, weight, mean, variance, saved_mean, saved_scale, eps, _ = args
        given = (_without_half(g), _without_half(x), weight, mean, variance, saved_mean, saved_scale, True, eps)
        gradient, *others = torch.ops.aten.native_batch_norm_backward(*given, [True, True, True])
        return gradient.to(x.dtype), *others
    return func(*args, **kwargs)


def _without_half(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _sleep(cycles: int) -> None:
    """Keep the device busy, at 2 GHz, as its events tell it."""
    ctypes.CDLL(None).kfac_dist_emulated_sleep(ctypes.c_double(cycles / 2e6))


def _shown_from_host(show: Callable[..., str]) -> Callable[..., str]:
    def shown(tensor: Tensor, *, tensor_contents: str | None = None) -> str:
        if tensor.is_cuda:
            wait("a tensor is printed")
            tensor = on_host(tensor.detach())
        return show(tensor, tensor_contents=tensor_contents)

    return shown

"""A nested state, such as `state_dict` gives, as flat tensors and a JSON tree, and back: no pickle."""

import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from kfac_dist.errors import InputError

# Each node of the tree is a list: what it is, then what it holds. JSON has neither tuples nor keys other than text.
_TENSOR, _DICT, _LIST, _TUPLE, _VALUE = "tensor", "dict", "list", "tuple", "value"


def flatten(state: object) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of a nested state.

    Args:
        state: Dicts, lists and tuples of tensors, numbers, strings, booleans and None; keys are strings, numbers or
            tuples of these.

    Returns:
        Tensors by name, and the tree that `unflatten` needs, which JSON can hold. Names follow the keys.

    Raises:
        TypeError: If there is anything else in it.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _take(state, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Undo `flatten`.

    Raises:
        InputError: If the tree is none that `flatten` made, or names a tensor that is not there.
    """
    match tree:
        case [str(kind), name] if kind == _TENSOR and isinstance(name, str) and name in tensors:
            return tensors[name]
        case [str(kind), value] if kind == _VALUE and isinstance(value, str | int | float | bool | None):
            return value
        case [str(kind), list(items)] if kind == _LIST:
            return [unflatten(tensors, item) for item in items]
        case [str(kind), list(items)] if kind == _TUPLE:
            return tuple(unflatten(tensors, item) for item in items)
        case [str(kind), list(items)] if kind == _DICT:
            return dict(_pair(tensors, item) for item in items)
    raise InputError(f"a saved state must be made of tensors that are there, values, lists and dicts, got {tree!r:.80}")


def encode(state: object) -> bytes:
    """A nested state as bytes, for `decode` on another rank."""
    tensors, tree = flatten(state)
    host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return save(host, {"tree": json.dumps(tree)})


def decode(message: bytes) -> Any:
    """Undo `encode`; tensors are on the CPU."""
    (length,) = struct.unpack("<Q", message[:8])  # the header that safetensors' own functions do not give
    tree = json.loads(json.loads(message[8 : 8 + length])["__metadata__"]["tree"])
    return unflatten(load(message), tree)


def _take(state: object, name: str, tensors: dict[str, Tensor]) -> list[Any]:
    match state:
        case Tensor():
            unique = name or "value"
            while unique in tensors:  # the keys "1" and 1
                unique += "'"
            tensors[unique] = state
            return [_TENSOR, unique]
        case Mapping():
            pairs = [[_take(key, "", {}), _take(value, _join(name, key), tensors)] for key, value in state.items()]
            return [_DICT, pairs]
        case list() | tuple():
            kind = _LIST if isinstance(state, list) else _TUPLE
            return [kind, [_take(item, _join(name, number), tensors) for number, item in enumerate(state)]]
        case str() | int() | float() | None:
            return [_VALUE, state]
    raise TypeError(f"a state holds tensors, numbers, strings, dicts and lists, got {type(state).__name__} at {name}")


def _join(name: str, key: object) -> str:
    part = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
    return f"{name}/{part}" if name else part


def _pair(tensors: Mapping[str, Tensor], item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2:
        raise InputError(f"a saved state's dict must hold pairs, got {item!r:.80}")
    key = unflatten({}, item[0])
    if not isinstance(key, str | int | float | tuple | None):
        raise InputError(f"a saved state's key must be text, a number or a tuple, got {key!r:.80}")
    return key, unflatten(tensors, item[1])

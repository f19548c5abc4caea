"""Nested states survive flattening, JSON and bytes; anything else is refused."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.errors import InputError
from kfac_dist.tensors.nested_state import decode, encode, flatten, unflatten

values = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(0, 99) | st.tuples(st.text(max_size=3), st.integers(0, 9))
tensors = st.builds(
    lambda seed, dtype: torch.arange(seed, seed + 3).to(dtype),
    st.integers(0, 50),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
)
states = st.recursive(
    values | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(states)
def test_a_state_comes_back_as_it_was(state: Any) -> None:
    tensors, tree = flatten(state)
    assert same(unflatten(tensors, json.loads(json.dumps(tree))), state)
    assert same(decode(encode(state)), state)


def test_names_follow_the_keys() -> None:
    tensors, _ = flatten({"running": {"A": torch.zeros(1)}, ("a", 1): [torch.ones(1)]})
    assert set(tensors) == {"running/A", "a/1/0"}


@pytest.mark.parametrize("odd", [object(), {1, 2}, b"bytes", {"a": lambda: 0}])
def test_anything_else_is_refused(odd: object) -> None:
    with pytest.raises(TypeError, match="a state holds tensors, numbers"):
        flatten(odd)


@pytest.mark.parametrize(
    "tree",
    [["tensor", "missing"], ["dict", [["one"]]], ["dict", [[["list", []], ["value", 1]]]], ["value", []], "x", None,
     ["exec", "1"], []],
)  # fmt: skip
def test_a_tree_of_something_else_is_refused(tree: Any) -> None:
    with pytest.raises(InputError, match="a saved state"):
        unflatten({}, tree)

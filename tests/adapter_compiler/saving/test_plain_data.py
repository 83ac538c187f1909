"""Nested states come back from JSON text and tensors as they were: types, keys, bits."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.plain_data import copy_state, decode, encode, has_same_bits, is_same_state


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "state", tensors))
    return decode(json.loads(text), tensors)


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.booleans(), st.none())
leaves = st.one_of(numbers, st.text(max_size=5), st.sampled_from([torch.zeros(2), torch.tensor(3), torch.ones(0)]))
keys = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.tuples(st.integers(0, 1), st.text(max_size=1)))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


def types_of(value: Any) -> Any:
    """The types in a nested state, which ``==`` does not tell apart: 1, 1.0 and True, list and tuple."""
    if isinstance(value, dict):
        return {key: (type(key), types_of(one)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [types_of(one) for one in value]
    return type(value)


@settings(max_examples=60, deadline=None)
@given(states)
def test_a_state_comes_back_with_its_types(value: Any) -> None:
    found = round_trip(value)
    assert is_same_state(found, value)
    assert types_of(found) == types_of(value)


@pytest.mark.parametrize("value", [0.1, 1e-320, -0.0, math.inf, -math.inf, math.pi])
def test_a_float_keeps_every_bit(value: float) -> None:
    assert round_trip(value).hex() == value.hex()


def test_nan_stays_nan() -> None:
    assert math.isnan(round_trip({"loss": math.nan})["loss"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.tensor([torch.nan, -0.0, torch.inf]),
        torch.arange(5, dtype=torch.int64),
        torch.randn(4).to(torch.bfloat16),
        torch.tensor(True),
        torch.randn(2, 0),
        torch.randn(8)[::2],
    ],
    ids=["transposed", "special", "int64", "bfloat16", "bool", "empty", "strided"],
)
def test_a_tensor_keeps_every_bit(tensor: torch.Tensor) -> None:
    found = round_trip({"exp_avg": tensor})["exp_avg"]
    assert has_same_bits(found, tensor)
    assert found.is_contiguous()


def test_tensors_are_copied_and_named_by_their_place() -> None:
    value, tensors = torch.zeros(2, requires_grad=True), dict[str, torch.Tensor]()
    text = encode({"a.b": value, "a": {"b": value}, "list": [value]}, "state", tensors)
    assert list(tensors) == ["state.a.b", "state.a.b#2", "state.list.0"]
    assert text == {
        "a.b": {"__tensor__": "state.a.b"},
        "a": {"b": {"__tensor__": "state.a.b#2"}},
        "list": [{"__tensor__": "state.list.0"}],
    }
    with torch.no_grad():
        value.fill_(1)
    assert not any(tensor.any() or tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize(
    "value",
    [
        {"__tensor__": "x"},
        {"__tuple__": [1]},
        {"__items__": []},
        {1: "a", "1": "b"},
        {(0, 1): [()], None: {}},
        {True: 1, "True": 2},
    ],
    ids=["tensor mark", "tuple mark", "items mark", "int and text", "tuples", "bool"],
)
def test_keys_that_json_lacks_or_that_look_like_marks_come_back(value: dict[Any, Any]) -> None:
    assert round_trip(value) == value
    assert types_of(round_trip(value)) == types_of(value)


def test_mappings_of_other_classes_become_dicts() -> None:
    found = round_trip(OrderedDict(b=1, a=2))
    assert type(found) is dict
    assert list(found) == ["b", "a"]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, torch.float32, len])
def test_what_is_no_plain_data_is_refused_by_its_place(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with pytest.raises(CheckpointError, match=rf"^state\.groups\.1 is a {type(value).__name__}, which cannot be saved"):
        encode({"groups": [0, value]}, "state", tensors)


@pytest.mark.parametrize(
    "text",
    [
        {"__tensor__": "absent"},
        {"__tensor__": 3},
        {"__tensor__": "here", "other": 1},
        {"__tuple__": "abc"},
        {"__tuple__": None},
        {"__items__": {"a": 1}},
        {"__items__": [["key"]]},
        {"__items__": [["key", 1, 2]]},
        {"__items__": [[["unhashable"], 1]]},
        {"deeper": [{"__tensor__": "absent"}]},
    ],
    ids=str,
)
def test_marks_with_something_else_in_them_are_refused(text: Any) -> None:
    with pytest.raises(CheckpointError):
        decode(text, {"here": torch.zeros(1)})


def test_a_copy_keeps_a_state_as_it_is_now() -> None:
    value: dict[str, Any] = {"a": [torch.zeros(2)], "b": (torch.zeros(1, requires_grad=True), "text")}
    copied = copy_state(value)
    assert is_same_state(copied, value)
    assert types_of(copied) == types_of(value)
    value["a"][0] += 1
    assert not copied["a"][0].any()
    assert not copied["b"][0].requires_grad


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(1), 0.0),
        ([1, 2], [1]),
        ({"a": 1}, {"b": 1}),
        ({"a": [torch.zeros(1)]}, {"a": [torch.ones(1)]}),
        ("a", "b"),
    ],
)
def test_states_that_differ(one: Any, other: Any) -> None:
    assert not is_same_state(one, other)
    assert not is_same_state(other, one)
    assert is_same_state(one, one) and is_same_state(other, other)


def test_nan_equals_itself_in_states_and_bits() -> None:
    nan = torch.tensor([torch.nan, -0.0])
    assert has_same_bits(nan, nan.clone())
    assert is_same_state({"loss": float("nan"), "t": nan}, {"loss": float("nan"), "t": nan.clone()})

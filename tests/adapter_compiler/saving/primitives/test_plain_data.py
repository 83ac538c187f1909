"""Nested states come back as they were, whatever their keys are, and what no file holds is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.plain_data import decode, encode, is_same_state
from passes.planning.json_schema import Source, dump_json, parse_json
from tests.adapter_compiler.saving.same_bits import assert_same_bits

SOURCE = Source(name="a state", error=CheckpointError, advice="save it again")


def pass_through(state: Any) -> Any:
    """What is read after a state was written."""
    tensors: dict[str, torch.Tensor] = {}
    text = dump_json(SOURCE, encode(state, "state", tensors))
    found = decode(parse_json(SOURCE, text), tensors)
    assert tensors == {}
    return found


def make_sparse(*, coalesced: bool) -> torch.Tensor:
    made = torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.randn(3, 2), (4, 2), check_invariants=True)
    return made.coalesce() if coalesced else made


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": 1}, "a.b": 2},
        {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(2), "a.b#2": torch.ones(3)},
        {1: torch.ones(1), "1": torch.ones(2), (1, "x"): [(), [], {}], None: None, 2.5: True},
        {"__tensor__": 1, "__tuple__": {"__items__": [1]}, "__sparse__": torch.ones(1)},
        {"": "", "ä": "\ud800", "\ud800": torch.ones(1), "a\0b": "\0"},
        [float("nan"), float("inf"), -0.0, 2**70, 5e-324, "x" * 1000],
        (torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 3), torch.ones(2, 3).t(), torch.tensor([True])),
        {"plain": make_sparse(coalesced=False), "sorted": make_sparse(coalesced=True)},
    ],
    ids=range(8),
)
def test_a_state_comes_back(state: Any) -> None:
    found = pass_through(state)
    assert_same_bits(found, state)
    assert is_same_state(found, state)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.integers(0, 3).map(lambda size: torch.arange(size))
)
KEYS = st.text("ab.#1_", max_size=3) | st.sampled_from(["__tensor__", "__items__", "a.b", "a"]) | st.integers(0, 3)
STATES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(KEYS, inner, max_size=4)
)


@given(STATES)
def test_any_state_comes_back(state: Any) -> None:
    assert_same_bits(pass_through(state), state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"__tensor__": "no"}', "the file has no tensor 'no', or names it twice, expected one for each place"),
        ('[{"__tensor__": "t"}, {"__tensor__": "t"}]', "has no tensor 't', or names it twice"),
        ('{"__tensor__": "t", "a": 1}', r"\['__tensor__', 'a'\] stand beside each other, expected __tensor__ alone"),
        ('{"__tuple__": 3}', "__tuple__ holds a int, expected a list"),
        ('{"__items__": [[1]]}', r"__items__ holds \[1\], expected \[key, value\] and each key once"),
        ('{"__items__": [[1, 2], [1, 3]]}', r"__items__ holds \[1, 3\], expected \[key, value\] and each key once"),
        ('{"__items__": [[{"__tuple__": [[]]}, 2]]}', r"__items__ holds .*, expected \[key, value\]"),
        ('{"__sparse__": [1]}', "__sparse__ holds no sparse tensor .*, expected .indices, values, shape, is_coalesced"),
        ('{"__sparse__": [{"__tensor__": "t"}, {"__tensor__": "v"}, [9], false]}', "__sparse__ holds no sparse tensor"),
        ('{"__sparse__": [{"__tensor__": "t"}, {"__tensor__": "v"}, [-1], null]}', "__sparse__ holds no sparse tensor"),
    ],
)
def test_what_was_not_written_like_this_is_refused(text: str, message: str) -> None:
    tensors = {"t": torch.tensor([[0, 99]]), "v": torch.ones(2)}
    with pytest.raises(CheckpointError, match=message):
        decode(parse_json(SOURCE, text), tensors)

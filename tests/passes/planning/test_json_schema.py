"""JSON of whatever origin: limits, keys that appear twice, and schemas."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.base import SiteError
from passes.planning import json_schema
from passes.planning.json_schema import (
    Field,
    Source,
    check_object,
    dump_json,
    is_count,
    is_finite,
    is_flag,
    is_list_of,
    is_object_of,
    is_or_null,
    is_string,
    is_text,
    parse_json,
    show,
)

SOURCE = Source(name="the text", error=SiteError, advice="write it again")

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    assert parse_json(SOURCE, dump_json(SOURCE, value)) == value
    assert parse_json(SOURCE, dump_json(SOURCE, value).encode()) == value


@given(st.text() | st.binary())
def test_any_text_gives_a_value_or_the_error_of_the_source(text: str | bytes) -> None:
    try:
        value = parse_json(SOURCE, text)
    except SiteError as error:
        assert str(error).startswith("the text: ")
        assert str(error).endswith("; write it again")
    else:
        assert json.dumps(value)


@pytest.mark.parametrize("kind", [str, bytes])
def test_limits_hold_before_values_are_made(kind: type) -> None:
    text = "[" + "{}," * 3_000_000 + "0]"
    data = text if kind is str else text.encode()
    tracemalloc.start()
    try:
        with pytest.raises(SiteError, match="holds about 6,000,001 values, expected at most 2,000,000"):
            parse_json(SOURCE, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_text_that_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(json_schema.DEEPEST):
        deep = [deep]
    round_trip: list[Any] = [1]
    round_trip.append(round_trip)
    for value, message in ((deep, "nested more than 100 levels deep"), (round_trip, "cannot be written as JSON")):
        with pytest.raises(SiteError, match=message):
            dump_json(SOURCE, value)
    monkeypatch.setattr(json_schema, "LARGEST_TEXT", 10)
    with pytest.raises(SiteError, match="has 12 characters, expected at most 10"):
        dump_json(SOURCE, "x" * 10)


def test_names_from_a_file_do_not_make_messages_endless() -> None:
    with pytest.raises(SiteError) as caught:
        check_object(SOURCE, "x" * 10_000, {"a": 1}, {})
    assert len(str(caught.value)) < 1200
    assert len(show(["y" * 10_000] * 100)) < 1000


SCHEMA = {"a": Field(expected="a count", fits=is_count), "b": Field(expected="text", fits=is_text, required=False)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"the text: part is \[\], expected an object; write it again"),
        ({}, "the text: part: the key 'a' is missing, expected a count there; write it again"),
        ({"a": -1}, "the text: part: a is -1, expected a count; write it again"),
        ({"a": True}, "the text: part: a is True, expected a count"),
        ({"a": 1, "b": ""}, "the text: part: b is '', expected text"),
        ({"a": 1, "c": 2}, "the text: part: the key 'c' is unknown, expected a, b; write it again"),
    ],
)
def test_an_object_that_does_not_fit_is_refused_with_the_key(value: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        check_object(SOURCE, "part", value, SCHEMA)


def test_an_object_that_fits_is_given_back() -> None:
    for value in ({"a": 0}, {"a": 2**63 - 1, "b": "x"}):
        assert check_object(SOURCE, "", value, SCHEMA) is value
    other = {"a": 0, "c": 1}
    assert check_object(SOURCE, "", other, SCHEMA, allow_unknown=True) is other


@pytest.mark.parametrize(
    ("fits", "right", "wrong"),
    [
        (is_text, ["x", "ä", " "], ["", None, 1, "\ud800", b"x"]),
        (is_string, ["", "x"], [None, "\ud800"]),
        (is_flag, [True, False], [0, 1, None, "true"]),
        (is_count, [0, 2**63 - 1], [-1, True, 1.0, 2**63, None, "1"]),
        (is_finite, [0, -1.5, 1e308, 10**300], [float("nan"), float("inf"), 10**400, True, "1", None]),
        (is_list_of(is_count), [[], [1, 2]], [None, (1,), [1, -1], "12"]),
        (is_object_of(is_count), [{}, {"a": 1}], [None, [], {"a": -1}, {"": 1}]),
        (is_or_null(is_count), [None, 1], [-1, "x"]),
    ],
)
def test_predicates(fits: Any, right: list[Any], wrong: list[Any]) -> None:
    assert all(map(fits, right))
    assert not any(map(fits, wrong))

"""Read untrusted JSON, and check it against a schema before use.

:func:`parse_json` limits the size of a text, its depth and the number of its values, and refuses duplicate keys.
:func:`check_object` compares an object with a schema: its keys and their values. Both raise the error class of the
caller's :class:`Source`, with the place in the text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

#: Largest size of a text in bytes or characters, which is also the limit of safetensors for headers.
LARGEST_TEXT = 100_000_000

#: Largest number of values in a text; each takes up to a hundred bytes of memory.
MOST_VALUES = 2_000_000

#: Largest depth of nested objects and lists.
DEEPEST = 100

#: The largest size that torch can represent.
LARGEST_SIZE = 2**63 - 1

#: Characters of a message, which names from a file must not make endless.
_LONGEST_PROBLEM = 1000

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 3

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a text comes from, and how errors in it are reported.

    Attributes:
        name: the beginning of messages: the path of a file, or words such as ``the plan``.
        error: makes an exception from a message.
        advice: the end of messages: what the user can do.
    """

    name: str
    error: Callable[[str], Exception]
    advice: str

    def fail(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the error: name, problem and advice."""
        if len(problem) > _LONGEST_PROBLEM:
            problem = f"{problem[: _LONGEST_PROBLEM // 2]} … {problem[-_LONGEST_PROBLEM // 2 :]}"
        raise self.error(f"{self.name}: {problem}; {self.advice}") from cause

    def refuse(self, field: str, found: object, expected: str) -> NoReturn:
        """Raise the error for a field whose value is not the expected one."""
        self.fail(f"{field} is {show(found)}, expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """The schema of one key of an object.

    Attributes:
        expected: the expected value in words, for messages.
        fits: whether a value is valid.
        required: whether the key must be present.
    """

    expected: str
    fits: Callable[[Any], bool]
    required: bool = True


def show(value: object) -> str:
    """The ``repr`` of a value for messages, shortened if it is long."""
    return _REPR.repr(value)


def parse_json(source: Source, text: str | bytes) -> Any:
    """The value of a JSON text.

    NaN and infinities are accepted as Python writes them; schemas refuse them where numbers must be finite.

    Raises:
        Exception: ``source.error``: the text is not JSON, has a duplicate key, or exceeds one of the limits.
    """
    _assert_small(source, text)
    unique = _UniqueKeys()
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, TypeError, RecursionError) as error:
        kind = "" if type(error) is json.JSONDecodeError else f"{type(error).__name__}: "
        source.fail(f"this is not JSON ({kind}{error}), expected a JSON text", error)
    if unique.doubled is not None:
        source.fail(f"the key {show(unique.doubled)} appears twice in one object, expected it once")
    _assert_shallow(source, value)
    return value


def dump_json(source: Source, value: Any, *, indent: int | None = None) -> str:
    """The JSON text of a value, within the limits of :func:`parse_json`.

    Raises:
        Exception: ``source.error``: the text would be too long or too deep.
    """
    try:
        text = json.dumps(value, indent=indent)
    except (ValueError, RecursionError) as error:
        source.fail(f"it cannot be written as JSON ({error}), expected at most {DEEPEST} levels", error)
    _assert_small(source, text)
    _assert_shallow(source, value)
    return text


class _UniqueKeys:
    """Makes dicts from pairs.

    Attributes:
        doubled: a key that appeared twice in one object.
    """

    def __init__(self) -> None:
        self.doubled: str | None = None

    def __call__(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.doubled = min(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found


def _assert_small(source: Source, text: str | bytes) -> None:
    if not isinstance(text, (str, bytes)):
        source.fail(f"this is a {type(text).__name__}, expected JSON text")
    if len(text) > LARGEST_TEXT:
        source.fail(f"the JSON text has {len(text):,} characters, expected at most {LARGEST_TEXT:,}")
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    values = sum(text.count(mark) for mark in marks)
    if values > MOST_VALUES:
        source.fail(f"the JSON text holds about {values:,} values, expected at most {MOST_VALUES:,}")


def _assert_shallow(source: Source, value: Any) -> None:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list, tuple))]:
        depth += 1
        if depth > DEEPEST:
            source.fail(f"its objects and lists are nested more than {DEEPEST} levels deep, expected fewer")
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]


def check_object(
    source: Source, where: str, value: Any, schema: Mapping[str, Field], *, allow_unknown: bool = False
) -> dict[str, Any]:
    """Check that a value is an object that fits a schema, and return it.

    Args:
        source: where the value comes from.
        where: the name of the object in messages; ``""`` for the whole text.
        value: the value.
        schema: the valid values of each key.
        allow_unknown: accept other keys, for files that other programs write too.

    Raises:
        Exception: ``source.error``; the message names the object and the key.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(value, dict):
        source.refuse(where or "the text", value, "an object")
    for key, field in schema.items():
        if key in value and not field.fits(value[key]):
            source.refuse(f"{prefix}{key}", value[key], field.expected)
        if field.required and key not in value:
            source.fail(f"{prefix}the key {key!r} is missing, expected {field.expected} there")
    unknown = () if allow_unknown else sorted(value.keys() - schema.keys())
    if unknown:
        source.fail(f"{prefix}the key {show(unknown[0])} is unknown, expected {', '.join(sorted(schema))}")
    return value


def is_string(value: Any) -> bool:
    """Whether a value is a string that can be encoded, which halves of surrogate pairs cannot."""
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)


def is_text(value: Any) -> bool:
    """Whether a value is a string that is not empty and can be encoded as UTF-8."""
    return isinstance(value, str) and bool(value) and not _LONE_SURROGATE.search(value)


def is_flag(value: Any) -> bool:
    """Whether a value is a bool."""
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 to :data:`LARGEST_SIZE`; bools are not."""
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def is_finite(value: Any) -> bool:
    """Whether a value is a number in the finite range of float; bools are not, numpy's float64 is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check that a value is a list, all of whose elements pass ``fits``."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def is_object_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check that a value is an object with nonempty keys, all of whose values pass ``fits``."""
    return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(fits, value.values()))


def is_or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check that a value is null or passes ``fits``."""
    return lambda value: value is None or fits(value)

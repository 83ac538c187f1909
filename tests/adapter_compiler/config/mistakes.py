"""The rows of a table of mistakes, and the check of their messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

#: What the user does (in an empty folder), the error, and four parts of its message, separated by `` | ``:
#: the site or option, what was found, what was expected, what to do next.
Mistake = tuple[Callable[[Path], object], type[Exception], str]

Mistakes = Mapping[str, Mistake]


def assert_message(mistake: Mistake, folder: Path) -> None:
    """Check that the error is raised and that its message has all four parts."""
    do, error, parts = mistake
    name, found, expected, advice = parts.split(" | ")
    with pytest.raises(error) as caught:
        do(folder)
    message = str(caught.value)
    for kind, part in {"name": name, "found": found, "expected": expected, "advice": advice}.items():
        assert part in message, f"{kind} {part!r} is not in the message: {message}"

"""What a row of a table of mistakes is, and how its message is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

#: What the user does (in a folder of its own), the error, and four parts of its message divided by `` | ``:
#: the site or option, what was found, what was expected, what to do next.
Mistake = tuple[Callable[[Path], object], type[Exception], str]

Mistakes = Mapping[str, Mistake]


def assert_message(mistake: Mistake, folder: Path) -> None:
    """The error comes, and its message has all four parts."""
    do, error, parts = mistake
    name, found, expected, advice = parts.split(" | ")
    with pytest.raises(error) as caught:
        do(folder)
    message = str(caught.value)
    for kind, part in {"name": name, "found": found, "expected": expected, "advice": advice}.items():
        assert part in message, f"{kind} {part!r} is not in the message: {message}"

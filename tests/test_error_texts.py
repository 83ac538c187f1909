"""Every error text is pinned in error_texts.txt, so that a change of wording is seen in review."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from tests.error_texts import find_error_classes, list_error_texts
from tests.source_files import find_modules, read_tree

SNAPSHOT = Path(__file__).parent / "error_texts.txt"
UPDATE = "UPDATE_ERROR_TEXTS"


def test_error_texts_are_as_pinned() -> None:
    found = list_error_texts()
    if os.environ.get(UPDATE):
        SNAPSHOT.write_text(found, encoding="utf-8")
    pinned = SNAPSHOT.read_text(encoding="utf-8")
    difference = "\n".join(
        difflib.unified_diff(pinned.splitlines(), found.splitlines(), "pinned", "found", lineterm="", n=1)
    )
    assert not difference, (
        f"error texts differ from tests/{SNAPSHOT.name}:\n{difference}\nIf the new wording is meant, run\n"
        f"    {UPDATE}=1 ./run tests tests/test_error_texts.py\nand commit the file."
    )


def test_the_classes_are_those_that_users_import() -> None:
    """Private classes below them count as well, but every public one must be found."""
    import adapter_compiler.errors

    found = find_error_classes([read_tree(file) for file in find_modules().values()])
    assert set(adapter_compiler.errors.__all__) <= found


SOURCE = """
ADVICE = "give one"

class OwnError(AdapterCompilerError): ...
class CloserError(OwnError): ...

def check(value, names):
    problem = "it is odd"
    if value:
        problem = f"it is {value!r}"
    raise CloserError(
        f"{value.name}: {problem}, {', '.join(names)} or {len(names):g} of "
        f"{'a' if value else 'b'}; {ADVICE}" + repr(sum(n for n in names))
    ) from None

def make(site):
    def inner():
        return OwnError("two\\nlines")
    raise ValueError
    raise KeyError(site)
    raise KeyError(f"no {site}")
    raise _refuse(site, "a number")

harmless = str("not an error")
"""

LISTED = """\
passes
    CloserError: {value.name}: {problem}, {join(names)} or {len(names):g} of {'a' or 'b'}; {ADVICE}{repr(sum(…))}
        {ADVICE} = give one
        {problem} = it is odd
        {problem} = it is {value!r}
    KeyError: no {site}
    OwnError: two\\nlines
    _refuse: {site} | a number
"""


def test_texts_are_read_from_the_source(tmp_path: Path) -> None:
    for package in ("adapter_compiler", "passes"):
        (tmp_path / package).mkdir()
    (tmp_path / "passes" / "__init__.py").write_text(SOURCE, encoding="utf-8")
    assert list_error_texts(tmp_path) == LISTED
    (tmp_path / "passes" / "__init__.py").write_text("\n\n" + SOURCE, encoding="utf-8")
    assert list_error_texts(tmp_path) == LISTED, "moved lines must not change the listing"

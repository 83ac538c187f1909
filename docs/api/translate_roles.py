"""Turn Sphinx roles in docstrings, such as ``:class:`~adapter_compiler.RankBudget```, into links of the site."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~?)(?P<target>[\w.]+)`")


class TranslateRoles(griffe.Extension):
    """Translates the docstring of every object that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object when it has been read."""
        if obj.docstring is not None:
            obj.docstring.value = translate_roles(obj.docstring.value, lambda name: _resolve(obj, name))


def translate_roles(text: str, resolve: Callable[[str], str]) -> str:
    """Replace each role by a link to the object that it names; plain code where the site has no page for it.

    Args:
        text: a docstring.
        resolve: a name as it stands in the docstring → its dotted path.
    """

    def translate(role: re.Match[str]) -> str:
        target = role["target"]
        shown = target.rpartition(".")[2] if role["short"] else target
        return f'<autoref identifier="{resolve(target)}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(translate, text)


def _resolve(obj: griffe.Object, name: str) -> str:
    """The dotted path of a name in a docstring; the name itself where it is one already."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name

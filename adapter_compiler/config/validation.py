"""Helpers for validated option classes: alternative names of options, suggestions, and checks of values.

An error names the option and its value, says what was expected, and ends with a valid value: the ``example`` in the
field's metadata if it has one, else the field's default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from adapter_compiler.errors import ConfigError
from passes.planning.json_schema import is_finite

T = TypeVar("T")


def accept_aliases(
    translate: Callable[[dict[str, Any]], dict[str, Any]] | None = None, /, **aliases: str
) -> Callable[[type[T]], type[T]]:
    """Make a class decorator that lets a keyword-only dataclass accept other names for its fields.

    Unknown names raise :class:`ConfigError` with the most similar known name.

    Args:
        translate: called with the options first; translates those whose values differ too (``use_rslora=True``).
        **aliases: the field for each other name (``init_r="rank"``).
    """

    def decorate(cls: type[T]) -> type[T]:
        generated = cls.__init__
        fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]

        @functools.wraps(generated)
        def initialize(self: T, **options: Any) -> None:
            own = options if translate is None else translate(options)
            generated(self, **_resolve(cls.__name__, own, fields, aliases))

        cls.__init__ = initialize  # type: ignore[method-assign,assignment]
        return cls

    return decorate


def _resolve(owner: str, options: Mapping[str, Any], fields: list[str], aliases: Mapping[str, str]) -> dict[str, Any]:
    resolved: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for given, value in options.items():
        name = aliases.get(given, given)
        if name not in fields:
            near = difflib.get_close_matches(given, [*fields, *aliases], n=1)
            hint = f"did you mean {near[0]!r}? " if near else "leave it out; "
            raise ConfigError(f"{owner} has no option {given!r}; {hint}there are: {', '.join(fields)}")
        if name in resolved:
            both = f"{spelled[name]}={resolved[name]!r} and {given}={value!r}"
            raise ConfigError(f"{owner} got {both}, expected the option {name!r} once; give one of them")
        resolved[name], spelled[name] = value, given
    return resolved


def assert_integer(owner: object, name: str, *, least: int) -> None:
    """Raise :class:`ConfigError` unless ``owner.name`` is an int (not a bool) of at least ``least``."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refuse(owner, name, f"an integer of at least {least}")


def assert_number(
    owner: object,
    name: str,
    *,
    least: float = -math.inf,
    below: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Raise :class:`ConfigError` unless ``owner.name`` is finite, ``>= least``, ``> above`` and ``< below``."""
    value = getattr(owner, name)
    if not is_finite(value) or value < least or value <= above or value >= below:
        wanted = [f">= {least:g}"] if least > -math.inf else []
        wanted += [f"> {above:g}"] if above > -math.inf else []
        wanted += [f"< {below:g}"] if below < math.inf else []
        raise _refuse(owner, name, f"a finite number {' and '.join(wanted)}".rstrip())


def assert_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``owner.name`` is one of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        raise _refuse(owner, name, f"one of {', '.join(map(repr, choices))}")


def assert_boolean(owner: object, name: str) -> None:
    """Raise :class:`ConfigError` unless ``owner.name`` is ``True`` or ``False``."""
    if not isinstance(getattr(owner, name), bool):
        raise _refuse(owner, name, "True or False")


def _refuse(owner: object, name: str, expected: str) -> ConfigError:
    (field,) = [field for field in dataclasses.fields(owner) if field.name == name]  # type: ignore[arg-type]
    example = field.metadata.get("example", field.default)
    advice = "leave it out for the default" if example is None else f"for example {name}={example!r}"
    return ConfigError(f"{type(owner).__name__}({name}={getattr(owner, name)!r}): expected {expected}; {advice}")

"""Names for the inputs and outputs of a model's file."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from passes.capture.calls import ModuleCall, split_call
from passes.compat import pytree


def bind_to_names(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> ModuleCall:
    """The call with positional arguments under the names of ``module.forward``, where they have one."""
    parameters = inspect.signature(module.forward).parameters
    positional = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        return split_call(args, kwargs)
    named = {**dict(zip(positional, args, strict=False)), **kwargs}
    in_order = [name for name in parameters if name in named]
    return split_call((), {name: named[name] for name in dict.fromkeys([*in_order, *named])})


def spell_names(paths: Sequence[str]) -> list[str]:
    """Unique ONNX value names: ``past[0]['key']`` becomes ``past.0.key``."""
    names: list[str] = []
    for path in paths:
        name = re.sub(r"[^0-9A-Za-z_]+", ".", path).strip(".") or "value"
        while name in names:
            name += "_"
        names.append(name)
    return names


def name_leaves(result: Any, default: str = "output") -> list[tuple[str, Any]]:
    """``(name, leaf)`` for each leaf of a result; a bare tensor is called ``default``.

    Dataclasses are taken apart whether or not torch knows them as containers.
    """
    found = list(_flatten(result, ()))
    names = spell_names([_join(path, default) for path, _ in found])
    return [(name, leaf) for name, (_, leaf) in zip(names, found, strict=True)]


def _flatten(tree: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            yield (*place, *path), leaf
            continue
        for field in dataclasses.fields(leaf):
            yield from _flatten(getattr(leaf, field.name), (*place, *path, pytree.GetAttrKey(field.name)))


def _join(path: tuple[Any, ...], default: str) -> str:
    text = pytree.keystr(path)
    return text if re.search(r"[A-Za-z_]", text) else default + text

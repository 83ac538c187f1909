"""Names for a model's inputs and outputs, and further inputs to verify an export on."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.capture.calls import ModuleCall, split_call
from passes.capture.capture import DimensionBound


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


def double_batch_of_one(call: ModuleCall) -> ModuleCall | None:
    """The call with each row given twice, if every tensor has a first dimension of one; else ``None``.

    A size of one cannot be exported as dynamic, because export decides on broadcasting by it.
    """
    tensors = [t for t in call.tensors if t.dim() > 0]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return None
    return split_call(*call.rebuild([t if t.dim() == 0 else t.repeat_interleave(2, 0) for t in call.tensors]))


def find_open_dimensions(call: ModuleCall, bounds: Sequence[Sequence[DimensionBound]]) -> list[tuple[int, int]]:
    """``(dimension, size)`` of what the export left open, the batch first.

    Two tensors whose same dimension has the same size are taken to mean the same thing (a label for each
    row), even where the model's code alone does not tie them together.
    """
    found = [
        (dimension, tensor.shape[dimension])
        for tensor, dimensions in zip(call.tensors, bounds, strict=True)
        for dimension, bound in enumerate(dimensions)
        if bound.symbol is not None
    ]
    return sorted(dict.fromkeys(found), key=lambda pair: pair[0])


def resize_call(
    call: ModuleCall, bounds: Sequence[Sequence[DimensionBound]], dimension: int, size: int, other: int
) -> ModuleCall:
    """The call with this dimension of this size, and all tied to it, brought to ``other`` entries.

    Entries are repeated or dropped, so that values stay within the example's.
    """
    tied = {
        b[dimension].symbol
        for b, t in zip(bounds, call.tensors, strict=True)
        if t.dim() > dimension and t.shape[dimension] == size
    } - {None}
    tensors = []
    for tensor, dimensions in zip(call.tensors, bounds, strict=True):
        for position, bound in enumerate(dimensions):
            if bound.symbol in tied:
                index = torch.arange(other, device=tensor.device) % tensor.shape[position]
                tensor = tensor.index_select(position, index)
        tensors.append(tensor)
    return split_call(*call.rebuild(tensors))

"""Nested states as JSON text and named tensors, and back, without pickle.

JSON knows no tuples, no keys but strings and no tensors, so these are written as marked objects. Floats keep
every bit: JSON text holds the shortest digits that give the same float back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON can hold it; its tensors go into ``tensors`` under names that begin with ``name``.

    Raises:
        CheckpointError: something in it is neither plain data nor a tensor.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = [[key, encode(one, f"{name}.{key}", tensors)] for key, one in value.items()]
        is_plain = all(isinstance(key, str) and key not in (_TENSOR, _TUPLE, _ITEMS) for key in value)
        return dict(items) if is_plain else {_ITEMS: [[encode(key, name, tensors), one] for key, one in items]}
    if isinstance(value, (list, tuple)):
        parts = [encode(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which cannot be saved without pickle; expected numbers, text, tensors, "
        "and dicts, lists and tuples of them"
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What :func:`encode` was given.

    Raises:
        CheckpointError: a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        if value[_TENSOR] not in tensors:
            raise CheckpointError(f"the file has no tensor {value[_TENSOR]}; save the state again")
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(decode(one, tensors) for one in value[_TUPLE])
    if _ITEMS in value:
        return {decode(key, tensors): decode(one, tensors) for key, one in value[_ITEMS]}
    return {key: decode(one, tensors) for key, one in value.items()}

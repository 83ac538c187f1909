"""Nested states as JSON text and named tensors, without pickle.

JSON knows no tuples, no keys but strings and no tensors, so these are written as marked objects. Floats keep
every bit: JSON text holds the shortest digits that give the same float back.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.safetensors_dtypes import assert_storable
from passes.planning.json_schema import DEEPEST, show

_TENSOR, _SPARSE, _TUPLE, _ITEMS = "__tensor__", "__sparse__", "__tuple__", "__items__"
_MARKS = {_TENSOR, _SPARSE, _TUPLE, _ITEMS}


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor], *, depth: int = 0) -> Any:
    """``value`` as JSON can hold it; its tensors go into ``tensors`` under names of their own like ``name``.

    Raises:
        CheckpointError: something in it is neither plain data nor a tensor that a file can hold, or it is nested too
            deep, as a dict that holds itself is.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, name, tensors)
    if depth >= DEEPEST:
        raise CheckpointError(
            f"{name[:100]}… is nested more than {DEEPEST} levels deep, expected fewer; keep a flatter state"
        )
    if isinstance(value, Mapping):
        items = [[key, encode(one, f"{name}.{key}", tensors, depth=depth + 1)] for key, one in value.items()]
        is_plain = all(isinstance(key, str) and key not in _MARKS for key in value)
        if is_plain:
            return dict(items)
        return {_ITEMS: [[encode(key, name, tensors, depth=depth + 1), one] for key, one in items]}
    if isinstance(value, (list, tuple)):
        parts = [encode(one, f"{name}.{i}", tensors, depth=depth + 1) for i, one in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which cannot be saved without pickle; expected numbers, text, tensors, "
        "and dicts, lists and tuples of them"
    )


def _encode_tensor(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if value.layout != torch.sparse_coo:
        return {_TENSOR: _add_tensor(value, name, tensors)}
    # Not coalesced, which would add values up in another order than the run that is saved.
    pair = (value.detach()._indices(), value.detach()._values())
    parts = [{_TENSOR: _add_tensor(part, name, tensors)} for part in pair]
    return {_SPARSE: [*parts, list(value.shape), value.is_coalesced()]}


def _add_tensor(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> str:
    """Put a copy of a tensor among others, under a name that is free, and return that."""
    assert_storable(name, value)
    plain = name.encode("utf-8", "replace").decode()
    # {"a.b": t} and {"a": {"b": t}} would have the same name.
    names = itertools.chain([plain], (f"{plain}#{number}" for number in itertools.count(2)))
    own = next(free for free in names if free not in tensors)
    tensors[own] = value.detach().contiguous().clone()
    return own


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What :func:`encode` was given. The tensors in it are taken out of ``tensors``, as each has one place.

    Raises:
        CheckpointError: a tensor is missing, or something is not as :func:`encode` writes it.
    """
    if isinstance(value, list):
        return [decode(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    marks = value.keys() & _MARKS
    if not marks:
        return {key: decode(one, tensors) for key, one in value.items()}
    if len(value) > 1:
        raise CheckpointError(f"{show(sorted(value))} stand beside each other, expected {min(marks)} alone")
    mark, content = next(iter(value.items()))
    if mark == _TENSOR:
        return _take_tensor(content, tensors)
    if not isinstance(content, list):
        raise CheckpointError(f"{mark} holds a {type(content).__name__}, expected a list; save the state again")
    if mark == _SPARSE:
        return _decode_sparse(content, tensors)
    return tuple(decode(one, tensors) for one in content) if mark == _TUPLE else _decode_items(content, tensors)


def _take_tensor(name: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise CheckpointError(
            f"the file has no tensor {show(name)}, or names it twice, expected one for each place; save the state again"
        )
    return tensors.pop(name)


def _decode_sparse(parts: list[Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    try:
        indices, values, shape, is_coalesced = parts
        pair = (decode(indices, tensors), decode(values, tensors))
        return torch.sparse_coo_tensor(*pair, shape, is_coalesced=is_coalesced, check_invariants=True)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{_SPARSE} holds no sparse tensor ({reason}), expected [indices, values, shape, is_coalesced]; save the "
            "state again"
        ) from error


def _decode_items(items: list[Any], tensors: dict[str, torch.Tensor]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for item in items:
        is_pair = isinstance(item, list) and len(item) == 2
        key, value = (decode(one, tensors) for one in item) if is_pair else ([], None)
        if not _is_key(key) or key in found:
            raise CheckpointError(
                f"{_ITEMS} holds {show(item)}, expected [key, value] and each key once; save the state again"
            )
        found[key] = value
    return found


def _is_key(value: Any) -> bool:
    """Whether a value can be a key: a tuple can be hashed only if all in it can."""
    return all(map(_is_key, value)) if isinstance(value, tuple) else isinstance(value, Hashable)


def copy_state(value: Any) -> Any:
    """Nested dicts, lists and tuples with copies of their tensors, by which a state stays as it is now."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_state(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(copy_state, value)] if isinstance(value, list) else tuple(map(copy_state, value))
    return value


def is_same_state(one: Any, other: Any) -> bool:
    """Whether two states are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and has_same_bits(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same_state, one, other))
    return bool(one is other or one == other or (one != one and other != other))


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, NaN and signed zeros as well."""
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout == torch.sparse_coo:
        pairs = zip((one._indices(), one._values()), (other._indices(), other._values()), strict=True)
        return one.is_coalesced() == other.is_coalesced() and all(has_same_bits(*pair) for pair in pairs)
    first, second = (t.detach().contiguous().reshape(-1).view(torch.uint8).cpu() for t in (one, other))
    return torch.equal(first, second)

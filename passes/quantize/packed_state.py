"""Packed weights in state dicts: as the plain tensors of their code, which every saver writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from passes.quantize.packed_weights import PackedWeight, as_parameter, find_packed_weights


def spread_packed(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Replace each packed weight in a state dict by the tensors of its code, ``<name>.<tensor>``, in place.

    Args:
        module: the module that has the weights.
        state: its state dict.
        prefix: what stands before the names of its parameters there.
    """
    for name in find_packed_weights(module):
        weight = state.pop(f"{prefix}{name}", None)
        if isinstance(weight, PackedWeight):
            # Copies, because weights share the tables of their code, and savers refuse shared memory.
            tensors = {key: t if key == "codes" else t.clone() for key, t in weight.packed.tensors().items()}
            state.update({f"{prefix}{name}.{key}": tensor.detach() for key, tensor in tensors.items()})


def gather_packed(module: nn.Module, state: dict[str, Any], prefix: str) -> list[str]:
    """Put packed weights together again from the tensors of :func:`spread_packed`, in place.

    Args:
        module: the module that has the weights, quantized in the same way.
        state: the state dict to load.
        prefix: what stands before the names of its parameters there.

    Returns:
        What does not fit, as messages.
    """
    problems = []
    for name, parameter in find_packed_weights(module).items():
        assert isinstance(parameter, PackedWeight)
        key = f"{prefix}{name}"
        found = {one: state.pop(f"{key}.{one}") for one in parameter.packed.tensors() if f"{key}.{one}" in state}
        if not found:
            continue
        problem = _find_problem(key, parameter, found)
        if problem is not None:
            problems.append(problem)
            state[key] = parameter
            continue
        values = copy.deepcopy(parameter.packed)
        for one, target in values.tensors().items():
            target.copy_(found[one])
        state[key] = as_parameter(PackedWeight(values, dtype=parameter.dtype), {})
    return problems


def _find_problem(key: str, parameter: PackedWeight, found: Mapping[str, Any]) -> str | None:
    expected = {one: (tuple(t.shape), t.dtype) for one, t in parameter.packed.tensors().items()}
    given = {one: (tuple(t.shape), t.dtype) for one, t in found.items()}
    if given == expected:
        return None
    return f"{key} is quantized: found {given}, expected {expected}; quantize both models in the same way"

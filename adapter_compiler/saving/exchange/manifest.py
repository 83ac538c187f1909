"""The manifest beside an exchanged adapter: what it must do, so that it can be verified wherever it goes.

For each weight it has ‖ΔW‖ and a number that depends on every entry of ΔW, uᵀ ΔW v with u_i = sin(i + 1) and
v_j = cos(j + 1), so that another order of rows is noticed as well. Optionally, reference inputs and outputs of the
whole model stand in a safetensors file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.exchange.updates import WeightUpdate
from adapter_compiler.saving.primitives.json_files import read_json_file
from passes.planning.json_schema import (
    Field,
    Source,
    check_object,
    dump_json,
    is_count,
    is_finite,
    is_flag,
    is_list_of,
    is_or_null,
    is_string,
    is_text,
)

_NAME = "adapter-compiler-manifest.json"
_REFERENCE = "adapter-compiler-reference.safetensors"
_FORMAT = 1
_ADVICE = "convert the adapters again"

_SCHEMA: Mapping[str, Field] = {
    "format": Field(expected="1", fits=lambda value: value == _FORMAT),
    "target": Field(expected="the name of a format", fits=is_text),
    "component": Field(expected="the name of a part of a pipeline", fits=is_or_null(is_text)),
    "adds_only": Field(expected="true or false", fits=is_flag),
    "tolerance": Field(expected="a number", fits=is_finite),
    "weights": Field(expected="an object of weights", fits=lambda value: isinstance(value, dict)),
}

_WEIGHT: Mapping[str, Field] = {
    "layer": Field(expected="a kind of module", fits=is_string),
    "shape": Field(expected="a list of sizes", fits=is_list_of(is_count)),
    "rank": Field(expected="a number of triplets", fits=is_count),
    "norm": Field(expected="a number", fits=is_finite),
    "projection": Field(expected="a number", fits=is_finite),
}


def find_manifest(adapter: Path) -> Path:
    """The path of the manifest of an adapter: in its folder, or beside its file."""
    return adapter / _NAME if adapter.is_dir() else adapter.with_name(f"{adapter.name}.{_NAME}")


def find_reference(adapter: Path) -> Path:
    """The path of the reference inputs and outputs of an adapter: in its folder, or beside its file."""
    return adapter / _REFERENCE if adapter.is_dir() else adapter.with_name(f"{adapter.name}.{_REFERENCE}")


def write_manifest(
    path: Path,
    updates: Sequence[WeightUpdate],
    *,
    target: str,
    component: str | None = None,
    adds_only: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the manifest of an adapter.

    Args:
        path: the file.
        updates: the adapters.
        target: the format.
        component: the part of a pipeline, for diffusers.
        adds_only: whether the adapters are all that changes, and only add to weights.
        dtype: that of the adapter's tensors, which sets how close ΔW must be.
    """
    values = {
        "format": _FORMAT,
        "target": target,
        "component": component,
        "adds_only": adds_only and all(update.magnitude is None for update in updates),
        "tolerance": max(1e-5, 8 * torch.finfo(dtype).eps),
        "weights": {update.weight: _describe(update) for update in updates},
    }
    source = Source(name=str(path), error=CheckpointError, advice="convert fewer adapters at once")
    path.write_text(dump_json(source, values, indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an adapter.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    values = read_json_file(path, _SCHEMA, advice=_ADVICE)
    source = Source(name=str(path), error=CheckpointError, advice=_ADVICE)
    for name, weight in values["weights"].items():
        check_object(source, f"weights: {name}", weight, _WEIGHT)
    return values


def project(delta: torch.Tensor) -> float:
    """uᵀ ΔW v in float64, with u_i = sin(i + 1) and v_j = cos(j + 1)."""
    rows = torch.arange(1, len(delta) + 1, dtype=torch.float64).sin()
    columns = torch.arange(1, delta.shape[1] + 1, dtype=torch.float64).cos()
    return float(rows @ delta.double() @ columns)


def _describe(update: WeightUpdate) -> dict[str, Any]:
    delta = update.delta()
    return {
        "layer": update.layer,
        "shape": list(update.shape),
        "rank": update.rank,
        "norm": float(delta.norm()),
        "projection": project(delta),
    }

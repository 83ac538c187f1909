"""The description of a file that this library wrote: versions, adapters, names of weights, ranges of inputs.

It is JSON in the model's metadata, under one key.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.errors import ExportError
from adapter_compiler.saving.onnx_files.protobuf_fields import copy_range, read_range, walk_fields
from passes.capture.calls import ModuleCall
from passes.planning.json_schema import (
    Field,
    Source,
    check_object,
    is_count,
    is_finite,
    is_list_of,
    is_object_of,
    is_or_null,
    is_string,
    is_text,
    parse_json,
)

#: Key of the entry in the model's ``metadata_props``.
METADATA_KEY = "adapter_compiler"

#: Key of the entry with ‖ΔW‖ of each merged weight, which a fold into a file appends.
UPDATES_KEY = "adapter_compiler.updates"

#: Key of the entry with how the file was verified; what changes the file after that drops it.
VERIFICATION_KEY = "adapter_compiler.verification"

_FORMAT_VERSION = 1

_VERIFICATION: Mapping[str, Field] = {
    "against": Field(expected="what it was compared with", fits=is_text),
    "inputs": Field(expected="their number", fits=is_count),
    "outputs": Field(expected="errors by output", fits=is_object_of(lambda value: isinstance(value, dict))),
    "rows": Field(expected="the number of samples", fits=is_count),
    "not_verified": Field(expected="a list of inputs", fits=is_list_of(is_string)),
}
_ERRORS: Mapping[str, Field] = {
    "max_abs": Field(expected="a number or null", fits=is_or_null(is_finite)),
    "max_rel": Field(expected="a number or null", fits=is_or_null(is_finite)),
}


def describe_file(
    model: torch.nn.Module, call: ModuleCall, inputs: Sequence[str], *, adapters: str, strategy: str
) -> dict[str, Any]:
    """The description of a file that is about to be written.

    Args:
        model: what was given to ``export_onnx``.
        call: the example.
        inputs: the names of the file's inputs.
        adapters: ``"merged"``, ``"runtime"`` or ``"none"``.
        strategy: what wrote it.
    """
    packages = ("adapter-compiler", "torch", "onnx", "onnxruntime")
    description: dict[str, Any] = {
        "format": _FORMAT_VERSION,
        # The installed package of some builds of torch leaves out the part after "+".
        "versions": {**{name: _find_version(name) for name in packages}, "torch": str(torch.__version__)},
        "adapters": adapters,
        "strategy": strategy,
        "inputs": dict(zip(inputs, map(_describe_tensor, call.tensors), strict=True)),
    }
    if isinstance(model, AdapterState):
        description |= {"configuration": hash_configuration(model), "ranks": find_live_ranks(model)}
    return description


def hash_configuration(adapted: AdapterState) -> str:
    """SHA-256 over the options, and each site's name, shape, form and scale; the same for the same set-up."""
    sites = [[a.site.name, list(a.site.shape), a.form.name, a.scale] for a in adapted.plan]
    text = json.dumps([repr(adapted.options), sites], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_live_ranks(adapted: AdapterState) -> dict[str, int]:
    """How many triplets of each site are not zero."""
    ranks = {}
    for adapter in adapted.plan:
        parameters = adapted.adapters.parameters_of(adapter)
        lam = parameters.get("lam")
        ranks[adapter.site.name] = adapter.rank if lam is None else int(torch.count_nonzero(lam.detach()))
    return ranks


def write_metadata(path: Path, description: Mapping[str, Any]) -> None:
    """Put the description into a file, in place; weights are not touched."""
    model = onnx.load(path, load_external_data=False)
    set_metadata(model, description)
    onnx.save(model, path)


def copy_with_metadata(source: Path, target: Path, description: Mapping[str, Any]) -> None:
    """Copy a file under another description, a piece at a time; its graph is not parsed.

    The record of its verification is left out, as the copy is to be changed.
    """
    entry = onnx.ModelProto()
    set_metadata(entry, description)
    with source.open("rb") as old, target.open("wb") as new:
        for field in walk_fields(old, 0, source.stat().st_size):
            if field.number == onnx.ModelProto.METADATA_PROPS_FIELD_NUMBER:
                kept = onnx.StringStringEntryProto.FromString(bytes(read_range(old, field.begin, field.end)))
                if kept.key in (METADATA_KEY, VERIFICATION_KEY):
                    continue
            copy_range(old, new, field.start, field.end)
        new.write(entry.SerializeToString())


def append_updates(path: Path, norms: Mapping[str, float]) -> None:
    """Append ‖ΔW‖ of each merged weight to a file; nothing before its end is read or written."""
    _append(path, UPDATES_KEY, norms)


def append_verification(path: Path, record: Mapping[str, Any]) -> None:
    """Append how a file was verified; nothing before its end is read or written.

    Args:
        path: the file.
        record: ``against``, what it was compared with; ``inputs``, their number; ``outputs``, by name, with the largest
            errors ``max_abs`` and ``max_rel``, null where they are not finite; ``rows``, how many samples of the user's
            there were; ``not_verified``, inputs that it could not be verified on.
    """
    _append(path, VERIFICATION_KEY, record)


def read_verification(model: onnx.ModelProto, name: str) -> dict[str, Any] | None:
    """How a file was verified when it was written, as :func:`append_verification` takes it; ``None`` if unknown.

    Raises:
        ExportError: the entry is damaged; ``name`` says in which file.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == VERIFICATION_KEY), None)
    if text is None:
        return None
    source = Source(name=f"{name}: its verification", error=ExportError, advice="export the model again")
    found = check_object(source, "", parse_json(source, text), _VERIFICATION)
    for output, errors in found["outputs"].items():
        check_object(source, f"output {output}", errors, _ERRORS)
    return found


def _append(path: Path, key: str, value: Mapping[str, Any]) -> None:
    entry = onnx.ModelProto()
    entry.metadata_props.add(key=key, value=json.dumps(value, sort_keys=True))
    with path.open("ab") as file:
        file.write(entry.SerializeToString())


def read_updates(model: onnx.ModelProto, description: Mapping[str, Any], name: str) -> dict[str, float]:
    """‖ΔW‖ of each merged weight, as an export or a fold has recorded it; empty if neither has.

    Raises:
        ExportError: the entry is damaged; ``name`` says in which file.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == UPDATES_KEY), None)
    source = Source(name=f"{name}: its updates", error=ExportError, advice="export or fold the model again")
    found = description.get("updates", {}) if text is None else parse_json(source, text)
    if not isinstance(found, dict) or not all(is_finite(value) for value in found.values()):
        source.fail("they are no numbers by weight, expected ‖ΔW‖ of each")
    return dict(found)


def set_metadata(model: onnx.ModelProto, description: Mapping[str, Any]) -> None:
    """Put the description into a loaded model, in place of an earlier one and of the record of its verification."""
    kept = [entry for entry in model.metadata_props if entry.key not in (METADATA_KEY, VERIFICATION_KEY)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(description, sort_keys=True))


def read_metadata(model: onnx.ModelProto, name: str) -> dict[str, Any]:
    """The description that a loaded model carries.

    Raises:
        ExportError: the model was not written by this library; ``name`` says which.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        raise ExportError(
            f"{name} was not exported by adapter-compiler (no {METADATA_KEY!r} in its metadata), expected a file that "
            "export_onnx wrote; export the model again"
        )
    found = parse_json(Source(name=f"{name}: its metadata", error=ExportError, advice="export the model again"), text)
    if not isinstance(found, dict) or found.get("format") != _FORMAT_VERSION:
        raise ExportError(
            f"{name}: its metadata is of another format; expected format {_FORMAT_VERSION}; export the model again"
        )
    return found


def describe_tensor(tensor: torch.Tensor) -> str:
    """The dtype, shape and checksum of a tensor, by which it can be compared with another one later."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)}:{compute_checksum(tensor)}"


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.detach().to(torch.float64) if not tensor.is_complex() else tensor.real.double()
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "low": low, "high": high}

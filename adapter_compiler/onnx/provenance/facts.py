"""What an ONNX file of this library says of itself, and the SHA-256 of its files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import ExportError
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import read_metadata, read_updates, read_verification
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
)

_BYTES_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileHash:
    """The SHA-256 of a file, in hexadecimal digits, and its size in bytes."""

    sha256: str
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of an ONNX file.

    Attributes:
        name: the file's name.
        description: what the export recorded.
        updates: ‖ΔW‖ of each merged weight, by name.
        verification: how the file was verified when it was written; ``None`` if it was changed after that.
        files: the hashes of the file and of those with its weights, by name, the file first.
    """

    name: str
    description: Mapping[str, Any]
    updates: Mapping[str, float]
    verification: Mapping[str, Any] | None
    files: Mapping[str, FileHash]


_INPUT: Mapping[str, Field] = {
    "dtype": Field(expected="a dtype", fits=is_text),
    "shape": Field(expected="a list of sizes", fits=is_list_of(is_count)),
    "low": Field(expected="a number", fits=is_finite),
    "high": Field(expected="a number", fits=is_finite),
}

_QUANTIZED: Mapping[str, Field] = {"kind": Field(expected="a kind", fits=is_text)}

_DESCRIPTION: Mapping[str, Field] = {
    "versions": Field(expected="versions of packages", fits=is_object_of(is_text)),
    "adapters": Field(expected="'merged', 'runtime' or 'none'", fits=is_text),
    "strategy": Field(expected="the name of a strategy", fits=is_text),
    "inputs": Field(expected="an object of inputs", fits=is_object_of(lambda value: isinstance(value, dict))),
    "configuration": Field(expected="a hash", fits=is_text, required=False),
    "ranks": Field(expected="ranks by weight", fits=is_object_of(is_count), required=False),
    "frozen": Field(expected="a list of texts", fits=is_list_of(is_string), required=False),
    "base_weights": Field(expected="a hash or null", fits=is_or_null(is_text), required=False),
}


def read_facts(path: Path) -> FileFacts:
    """Read the description of a file, and hash it with the files that hold its weights; the weights are not loaded.

    Raises:
        ExportError: the file is missing, damaged, or was not written by this library.
    """
    opened = InitializerFile(path)
    description = read_metadata(opened.header, path.name)
    source = Source(name=str(path), error=ExportError, advice="export the model again")
    check_object(source, "its description", description, _DESCRIPTION, allow_unknown=True)
    for name, entry in description["inputs"].items():
        check_object(source, f"its description: input {name}", entry, _INPUT, allow_unknown=True)
    if "quantized" in description:
        check_object(source, "its description: quantized", description["quantized"], _QUANTIZED, allow_unknown=True)
    return FileFacts(
        name=path.name,
        description=description,
        updates=read_updates(opened.header, description, path.name),
        verification=read_verification(opened.header, path.name),
        files={name: hash_file(path.parent / name) for name in (path.name, *sorted(opened.external_files()))},
    )


def hash_bytes(data: bytes) -> FileHash:
    """The SHA-256 and size of a file with these bytes."""
    return FileHash(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def hash_file(path: Path) -> FileHash:
    """The SHA-256 and size of a file, read a piece at a time."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_BYTES_AT_ONCE):
            digest.update(piece)
            size += len(piece)
    return FileHash(sha256=digest.hexdigest(), size=size)

"""The manifest at the end of an ``.onnx_adapter`` file: what base it belongs to, and a checksum of the whole file.

onnxruntime's format has room for two version numbers only, and its reader accepts most flipped bits. It ignores bytes
after its own, so the file is still one that onnxruntime loads:

    onnxruntime's data | manifest as JSON | SHA-256 of all but itself | length of the manifest, 8 bytes | _MAGIC
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.paths import read_file_bytes
from passes.planning.json_schema import (
    LARGEST_TEXT,
    Field,
    Source,
    check_object,
    dump_json,
    is_count,
    is_object_of,
    is_text,
    parse_json,
)

_FORMAT = 1
_MAGIC = b"adapter-compiler"
_LENGTH = struct.Struct("<Q")
_DIGEST_BYTES = hashlib.sha256().digest_size
_TAIL_BYTES = _DIGEST_BYTES + _LENGTH.size + len(_MAGIC)
#: Files up to this size are read.
_LARGEST_FILE = 1 << 36

_SCHEMA: Mapping[str, Field] = {
    "format": Field(expected="a version", fits=is_count),
    "base": Field(expected="checksums of the base model's tensors", fits=is_object_of(is_text)),
}


def append_manifest(path: Path, base: Mapping[str, str]) -> None:
    """Complete a file of onnxruntime's.

    Args:
        path: the file.
        base: checksums of the tensors of the base model, by name.
    """
    source = Source(name=path.name, error=CheckpointError, advice="adapt a model with fewer tensors")
    manifest = dump_json(source, {"format": _FORMAT, "base": dict(base)}).encode()
    end = _LENGTH.pack(len(manifest)) + _MAGIC
    digest = hashlib.sha256(path.read_bytes() + manifest + end).digest()
    with path.open("ab") as file:
        file.write(manifest + digest + end)


def read_with_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    """onnxruntime's part of a file and its manifest.

    Raises:
        CheckpointError: the file is missing, has no manifest, or its bytes have changed.
    """
    source = Source(name=str(path), error=CheckpointError, advice="save it again with save_onnx_adapter")
    data = read_file_bytes(source, path, _LARGEST_FILE)
    if len(data) < _TAIL_BYTES or not data.endswith(_MAGIC):
        source.fail("this file does not end as save_onnx_adapter writes it, expected a whole .onnx_adapter file")
    end = data[-_LENGTH.size - len(_MAGIC) :]
    content, digest = data[:-_TAIL_BYTES], data[-_TAIL_BYTES : -len(end)]
    if hashlib.sha256(content + end).digest() != digest:
        source.fail("its checksum is another one, so it was damaged or changed, expected the bytes that were saved")
    (length,) = _LENGTH.unpack(end[: _LENGTH.size])
    if length > min(len(content), LARGEST_TEXT):
        source.fail(f"its manifest has {length:,} bytes, expected at most {min(len(content), LARGEST_TEXT):,}")
    split = len(content) - length
    manifest = check_object(source, "its manifest", parse_json(source, content[split:]), _SCHEMA)
    if manifest["format"] != _FORMAT:
        source.refuse("its format", manifest["format"], str(_FORMAT))
    return content[:split], manifest

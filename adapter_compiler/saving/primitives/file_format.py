"""Formats of our own files: what their headers say, and how they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.safetensors_dtypes import DTYPE_NAMES, assert_storable
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader, read_safetensors
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
    show,
)

#: Where the header's JSON stands in the metadata of every file of ours.
HEADER_KEY = "adapter_compiler"


#: Keys of the header for its own checksum, and for the dtype, shape and checksum of each tensor. Files of earlier
#: versions lack them.
_CHECKSUM, _TENSORS = "checksum", "tensors"

#: What other tools look for in a safetensors file that holds tensors of torch.
_FORMAT = {"format": "pt"}

#: What every header has; whether kind and version are the right ones is checked by themselves.
_COMMON: Mapping[str, Field] = {
    "kind": Field(expected="a kind of file", fits=is_text, required=False),
    "version": Field(expected="a version", fits=is_count),
    _CHECKSUM: Field(expected="a checksum", fits=is_text, required=False),
    _TENSORS: Field(
        expected="[dtype, shape, checksum] by tensor",
        fits=is_object_of(lambda value: isinstance(value, list) and len(value) == 3),
        required=False,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A kind of file: what its header says, and who writes it.

    Attributes:
        kind: what the header has under ``kind``; ``None`` for saved adapters, whose header has no such key.
        version: what it has under ``version``; files of any other are not read.
        writer: what writes such files, for messages.
        schema: the other keys of the header. A file with a key that is not among them is not read: what is not
            understood may change what the file means.
    """

    kind: str | None
    version: int
    writer: str
    schema: Mapping[str, Field]

    def make_metadata(self, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The metadata of a safetensors file with this header, to which kind, version and checksums are added.

        Args:
            header: what :attr:`schema` describes.
            tensors: what the file will hold.

        Raises:
            CheckpointError: the header is too long or too deep to be read again, or a tensor cannot be stored.
        """
        kind = {} if self.kind is None else {"kind": self.kind}
        advice = "keep long lists of numbers as tensors"
        source = Source(name="the header of a file to write", error=CheckpointError, advice=advice)
        sums = {name: _describe_tensor(name, tensor) for name, tensor in tensors.items()}
        whole = {**kind, "version": self.version, **header, _TENSORS: sums}
        text = dump_json(source, {**whole, _CHECKSUM: _hash(whole)})
        # It stands as a string in the JSON of the file's own header, where quotes are escaped.
        if (length := len(json.dumps(text))) > LARGEST_TEXT:
            source.fail(f"it has {length:,} characters, expected at most {LARGEST_TEXT:,}")
        return {HEADER_KEY: text, **_FORMAT}

    def read_header(self, path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The header of a file of this format. Every reader of our files goes through here.

        Args:
            path: the file, for messages.
            metadata: the metadata of the safetensors file.

        Raises:
            CheckpointError: it is not ours, damaged, or of another format or version.
        """
        if HEADER_KEY not in metadata:
            raise CheckpointError(
                f"{path} was not written by adapter-compiler (no {HEADER_KEY!r} in its header); expected a file that "
                f"{self.writer} wrote; give its folder"
            )
        source = Source(name=str(path), error=CheckpointError, advice="save it again")
        others = {key: value for key, value in metadata.items() if key != HEADER_KEY}
        if others not in ({}, _FORMAT):
            source.fail(f"its metadata has {show(others)}, expected {show(_FORMAT)}: it was changed or damaged")
        header = parse_json(source, metadata[HEADER_KEY])
        self._assert_same_format(path, header if isinstance(header, dict) else {})
        checked = check_object(source, "its header", header, {**_COMMON, **self.schema})
        found = checked.pop(_CHECKSUM, None)
        if found is not None and found != _hash(checked):
            source.fail(f"its header has the checksum {found}, expected {_hash(checked)}: it was changed or damaged")
        return checked

    def _assert_same_format(self, path: Path, header: Mapping[str, Any]) -> None:
        kind, version = header.get("kind"), header.get("version")
        if kind == self.kind and type(version) is int and version == self.version:
            return
        if kind is self.kind is None:
            problem = f"its header has format version {show(version)}, expected {self.version}"
        else:
            found, expected = (show(name or "saved adapters") for name in (kind, self.kind))
            problem = f"it holds {found} of version {show(version)}, expected {expected} of version {self.version}"
        raise CheckpointError(
            f"{path}: {problem}; give a file that {self.writer} of this version of adapter-compiler wrote, or save it "
            "again with that"
        )


def read_file(path: Path, file_format: FileFormat) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors of a file.

    Raises:
        CheckpointError: it is missing, damaged, not ours, or of another format or version.
    """
    header, file = open_own_file(path, file_format)
    return header, file.read_all()


def open_own_file(path: Path, file_format: FileFormat) -> tuple[dict[str, Any], SafetensorsHeader]:
    """The header of a file of this format and where its tensors lie; none of them is read. See :func:`read_file`."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a folder that {file_format.writer} wrote; save there first"
        )
    file = read_safetensors(path)
    header = file_format.read_header(path, file.metadata)
    sums = header.pop(_TENSORS, None)
    if sums is None:
        return header, file
    source = Source(name=str(path), error=CheckpointError, advice="save it again")
    found = {name: [place.dtype_name, list(place.shape)] for name, place in file.tensors.items()}
    if found != {name: entry[:2] for name, entry in sums.items()}:
        odd = min(name for name in {**found, **sums} if found.get(name) != sums.get(name, [])[:2])
        source.fail(
            f"the tensor {odd} is {found.get(odd)}, its header says {sums.get(odd, [None])[:2]}, expected the same"
        )
    return header, dataclasses.replace(file, checksums={name: entry[2] for name, entry in sums.items()})


def _describe_tensor(name: str, tensor: torch.Tensor) -> list[Any]:
    assert_storable(name, tensor)
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), compute_checksum(tensor)]


def _hash(header: Mapping[str, Any]) -> str:
    """A hash of a header, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16).hexdigest()

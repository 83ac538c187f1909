"""The header of a safetensors file, checked against the file before anything is allocated.

    8 bytes     length of the header, little-endian
    header      JSON: by name dtype, shape and [begin, end] of the data; strings by key under __metadata__
    data        the tensors, one after another, without gaps

Every reader of such files goes through :func:`read_safetensors`, whoever wrote the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.paths import open_file
from adapter_compiler.saving.primitives.safetensors_dtypes import DTYPES
from passes.planning.json_schema import (
    LARGEST_SIZE,
    LARGEST_TEXT,
    Field,
    Source,
    check_object,
    is_count,
    is_list_of,
    is_object_of,
    is_string,
    parse_json,
    show,
)

#: No tensor has more dimensions.
_MOST_DIMENSIONS = 64

_METADATA = "__metadata__"

LENGTH_BYTES = 8

_ENTRY: Mapping[str, Field] = {
    "dtype": Field(
        expected=f"one of {', '.join(DTYPES)}", fits=lambda value: isinstance(value, str) and value in DTYPES
    ),
    "shape": Field(
        expected=f"a list of at most {_MOST_DIMENSIONS} sizes",
        fits=lambda value: is_list_of(is_count)(value) and len(value) <= _MOST_DIMENSIONS and _count_cells(value) > 0,
    ),
    "data_offsets": Field(
        expected="[begin, end]",
        fits=lambda value: is_list_of(is_count)(value) and len(value) == 2 and value[0] <= value[1],
    ),
}


def _count_cells(shape: list[int]) -> int:
    """The product of the sizes other than 0, or 0 if torch cannot hold it."""
    cells = math.prod(size for size in shape if size)
    return cells if cells <= LARGEST_SIZE else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        file: the file.
        name: the tensor's name in it.
        dtype_name: the format's name of its dtype.
        shape: its shape.
        begin: where its bytes begin, counted from the start of the file.
        end: where they end.
    """

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Torch's dtype; ``None`` where it has none."""
        return DTYPES[self.dtype_name][1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file says of itself.

    Attributes:
        path: the file.
        metadata: strings by key.
        tensors: by name, in the order of their bytes.
        data_begin: where the data begins.
        checksums: those that tensors must have, as far as the format says any.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorPlace]
    data_begin: int
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: place.shape for name, place in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            CheckpointError: torch has no such dtype, the file has become shorter, or the tensor has another checksum.
        """
        tensor = read_tensor(self.tensors[name])
        expected = self.checksums.get(name)
        if expected is not None and (found := compute_checksum(tensor)) != expected:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the checksum {found}, expected {show(expected)}: it was changed or "
                "damaged; save it again"
            )
        return tensor

    def read_all(self) -> dict[str, torch.Tensor]:
        """All tensors; see :meth:`read`."""
        return {name: self.read(name) for name in self.tensors}


def read_safetensors(path: Path, *, error: Callable[[str], Exception] = CheckpointError) -> SafetensorsHeader:
    """The header of a file; no tensor is read.

    Raises:
        CheckpointError: or ``error``: the file is missing, truncated, no safetensors file, or its header says what
            cannot be, such as tensors that overlap or are longer than the file.
    """
    source = _describe(path, error)
    with open_file(source, path) as file:
        size = os.fstat(file.fileno()).st_size
        text = _read_text(source, file, size)
    header = parse_json(source, text)
    if not isinstance(header, dict):
        source.refuse("the header", header, "an object")
    metadata = header.pop(_METADATA, {})
    if not is_object_of(is_string)(metadata):
        source.refuse(_METADATA, metadata, "text by key")
    if odd := [name for name in header if not is_string(name)]:
        source.refuse("the name of a tensor", odd[0], "text without halves of surrogate pairs")
    begin = LENGTH_BYTES + len(text)
    places = [_check_entry(source, path, name, entry, begin) for name, entry in header.items()]
    places.sort(key=lambda place: (place.begin, place.end))
    _assert_contiguous(source, places, begin, size)
    tensors = {place.name: place for place in places}
    return SafetensorsHeader(path=path, metadata=metadata, tensors=tensors, data_begin=begin)


def read_tensor(place: TensorPlace) -> torch.Tensor:
    """The tensor that lies at a place; see :meth:`SafetensorsHeader.read`."""
    source = _describe(place.file, CheckpointError)
    if place.dtype is None:
        source.fail(f"tensor {place.name} is {place.dtype_name}, which torch does not have, expected another dtype")
    values = torch.empty(place.end - place.begin, dtype=torch.uint8)
    with open_file(source, place.file) as file:
        file.seek(place.begin)
        found = file.readinto(values.numpy().data) if len(values) else 0
    if found != len(values):
        source.fail(f"tensor {place.name} ends after {found} of its {len(values)} bytes, expected all of them")
    if place.dtype is torch.bool and bool((values > 1).any()):
        source.fail(f"tensor {place.name} of dtype BOOL has other bytes than 0 and 1, expected these")
    return values.view(place.dtype).reshape(place.shape)


def _describe(path: Path, error: Callable[[str], Exception]) -> Source:
    name = f"{path} cannot be read as a safetensors file"
    return Source(name=name, error=error, advice="fetch or save it again")


def _read_text(source: Source, file: io.BufferedReader, size: int) -> bytes:
    """The header's text, no longer than the file."""
    if size < LENGTH_BYTES:
        source.fail(f"it has {size} bytes, expected at least {LENGTH_BYTES}")
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    largest = min(size - LENGTH_BYTES, LARGEST_TEXT)
    if not 2 <= length <= largest:
        source.fail(f"its header would have {length:,} bytes, expected 2 to {largest:,}")
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        source.fail("its header does not begin with '{' or is cut off, expected a whole one")
    return text


def _check_entry(source: Source, path: Path, name: str, entry: Any, begin: int) -> TensorPlace:
    entry = check_object(source, f"tensor {name}", entry, _ENTRY)
    first, end = entry["data_offsets"]
    size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]][0]
    if size % 8 or end - first != size // 8:
        source.fail(
            f"tensor {name} of dtype {entry['dtype']} and shape {entry['shape']} has {end - first} bytes, "
            f"expected {size / 8:g}"
        )
    place = {"begin": begin + first, "end": begin + end}
    return TensorPlace(file=path, name=name, dtype_name=entry["dtype"], shape=tuple(entry["shape"]), **place)


def _assert_contiguous(source: Source, places: list[TensorPlace], begin: int, size: int) -> None:
    """Raise unless each tensor begins where the one before ends, and the last one ends with the file."""
    position = begin
    for place in places:
        if place.begin != position:
            what = "overlaps the one before" if place.begin < position else "leaves a gap behind the one before"
            source.fail(f"tensor {place.name} begins at {place.begin} and {what}, expected {position}")
        position = place.end
    if position != size:
        source.fail(f"it has {size} bytes, its header describes {position}, expected as many")

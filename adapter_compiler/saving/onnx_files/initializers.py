"""Read and overwrite single initializers of an ONNX file without loading the others.

Weights are in the file itself or, for large models, in a file beside it. Either way the place of each one's bytes is
known, and one weight at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy
import onnx
import torch
from onnx import TensorProto

from adapter_compiler.errors import ExportError
from adapter_compiler.saving.onnx_files.protobuf_fields import Field, read_range, walk_fields
from adapter_compiler.saving.primitives.paths import find_inside
from passes.planning.json_schema import Source, show

_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


class InitializerFile:
    """An ONNX file opened for reading and replacing weights.

    Attributes:
        path: the file.
        header: the model without its graph: versions and metadata.
    """

    def __init__(self, path: Path) -> None:
        """Find the weights.

        Raises:
            ExportError: the file is missing or no ONNX model.
        """
        self.path = path
        self.header = onnx.ModelProto()
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._places: dict[str, _Place] = {}
        try:
            with path.open("rb") as file:
                self._read_model(file)
        except ExportError:
            raise
        except Exception as error:  # protobuf and the file system raise unrelated types
            raise ExportError(f"{path} cannot be read as an ONNX model: {error}; expected a whole file") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return tuple(self._tensors[name].dims)

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a weight, ``None`` if torch has none for it."""
        return _DTYPES.get(self._tensors[name].data_type)

    def external_files(self) -> set[str]:
        """Names of the files beside this one that hold weights."""
        beside = {place.file for place in self._places.values()} - {self.path}
        return {file.relative_to(self.path.parent).as_posix() for file in beside}

    def read(self, name: str) -> torch.Tensor:
        """A copy of a weight.

        Raises:
            ExportError: the file ends before the weight does.
        """
        dtype, place = self.dtype(name), self._places.get(name)
        assert dtype is not None
        if place is None:
            try:
                return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(self._tensors[name])))
            except (ValueError, TypeError) as error:
                raise ExportError(
                    f"{self.path}: the values of {name} are not as many as its shape says ({error}), expected "
                    f"{self.shape(name)}; export it again"
                ) from error
        if not place.length:
            return torch.empty(self.shape(name), dtype=dtype)
        try:
            with place.file.open("rb") as file:
                data = read_range(file, place.offset, place.offset + place.length)
        except ValueError as error:
            raise ExportError(f"{place.file}, which holds the weight {name}, is truncated: {error}") from error
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape(name))

    def write(self, name: str, values: torch.Tensor) -> None:
        """Overwrite a weight by one of its shape and dtype.

        Raises:
            ExportError: its values are not in the file as plain bytes.
        """
        place, data = self._places.get(name), to_buffer(values)
        if place is None:
            raise ExportError(
                f"{self.path}: the values of {name} are not there as plain bytes (raw_data), so they cannot be "
                "overwritten; expected a file as export_onnx writes it; export it again"
            )
        if len(data) != place.length:
            raise ExportError(f"{self.path}: {name} takes {place.length} bytes, the new values {len(data)}")
        if shared := [other for other, one in self._places.items() if other != name and one.overlaps(place)]:
            raise ExportError(
                f"{self.path}: the bytes of {name} are those of {shared[0]} too, so that one cannot be overwritten "
                "alone; expected bytes of its own; export it again"
            )
        with place.file.open("r+b") as file:
            file.seek(place.offset)
            file.write(data)

    def _read_model(self, file: BinaryIO) -> None:
        end = file.seek(0, io.SEEK_END)
        graphs = 0
        for field in walk_fields(file, 0, end):
            if field.number == onnx.ModelProto.GRAPH_FIELD_NUMBER:
                graphs += 1
                for part in walk_fields(file, field.begin, field.end):
                    if part.number == onnx.GraphProto.INITIALIZER_FIELD_NUMBER:
                        self._add_tensor(file, part)
            else:
                self.header.MergeFromString(bytes(read_range(file, field.start, field.end)))
        if not graphs:
            raise ValueError("it has no graph")

    def _add_tensor(self, file: BinaryIO, field: Field) -> None:
        """Read all of a tensor but its values, and note where those are."""
        tensor, place = TensorProto(), None
        for part in walk_fields(file, field.begin, field.end):
            if part.number == TensorProto.RAW_DATA_FIELD_NUMBER:
                place = _Place(file=self.path, offset=part.begin, length=part.end - part.begin)
            else:
                tensor.MergeFromString(bytes(read_range(file, part.start, part.end)))
        if tensor.data_location == TensorProto.EXTERNAL:
            place = self._find_external(tensor)
        self._tensors[tensor.name] = tensor
        if place is not None:
            self._assert_place_fits(tensor, place)
            self._places[tensor.name] = place

    def _assert_place_fits(self, tensor: onnx.TensorProto, place: _Place) -> None:
        """Raise unless the bytes of a weight are in their file, as many as its shape says."""
        dtype = _DTYPES.get(tensor.data_type)
        expected = place.length if dtype is None else math.prod(tensor.dims) * dtype.itemsize
        size = place.file.stat().st_size if place.file.is_file() else -1
        if place.length != expected or min(place.offset, place.length) < 0 or place.offset + place.length > size:
            raise ExportError(
                f"{self.path}: the weight {show(tensor.name)} of shape {show(list(tensor.dims))} has {place.length} "
                f"bytes at {place.offset} of {place.file.name}, which has {size}, expected {expected} bytes in it; "
                "export it again, and keep its data beside it"
            )

    def _find_external(self, tensor: onnx.TensorProto) -> _Place:
        """Offset and length may be left out: from the start, as much as the shape says."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = _DTYPES.get(tensor.data_type)
        size = 0 if dtype is None else math.prod(tensor.dims) * dtype.itemsize
        source = Source(name=str(self.path), error=ExportError, advice="export it again")
        file = find_inside(source, f"location of {show(tensor.name)}", self.path.parent, entries.get("location"))
        return _Place(file=file, offset=int(entries.get("offset", 0)), length=int(entries.get("length", size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the bytes of a weight are."""

    file: Path
    offset: int
    length: int

    def overlaps(self, other: _Place) -> bool:
        """Whether two weights have bytes in common."""
        is_before = self.offset + self.length <= other.offset or other.offset + other.length <= self.offset
        return self.file == other.file and not is_before


def to_buffer(values: torch.Tensor) -> memoryview:
    """The elements of a tensor, row by row, as they are in files; nothing is copied if memory has the same order."""
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

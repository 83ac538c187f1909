"""Read and overwrite single initializers of an ONNX file without loading the others.

Weights stand in the file itself or, for large models, at an offset in a file beside it; either way one weight
at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import onnx
import torch
from onnx import TensorProto

from adapter_compiler.errors import ExportError

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
        model: its graph; weights that stand beside it are not loaded.
    """

    def __init__(self, path: Path) -> None:
        """Read the graph.

        Raises:
            ExportError: the file is missing or no ONNX model.
        """
        self.path = path
        try:
            self.model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf and the file system raise unrelated types
            raise ExportError(f"{path} cannot be read as an ONNX model: {error}") from error
        if not self.model.HasField("graph"):
            raise ExportError(f"{path} cannot be read as an ONNX model: it has no graph; expected a whole file")
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}

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
        return {place[0] for tensor in self._tensors.values() if (place := _find_place(tensor)) is not None}

    def rename_external(self, old: str, new: str) -> None:
        """Let the weights that stand in the file ``old`` be looked for in ``new``."""
        for tensor in self._tensors.values():
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value == old:
                    entry.value = new

    def read(self, name: str) -> torch.Tensor:
        """A copy of a weight."""
        tensor, dtype = self._tensors[name], self.dtype(name)
        assert dtype is not None
        place = _find_place(tensor)
        if place is None and not tensor.HasField("raw_data"):
            return torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(tensor)))
        data = bytearray(tensor.raw_data if place is None else self._read_beside(*place))
        if not data:
            return torch.empty(self.shape(name), dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape(name))

    def write(self, name: str, values: torch.Tensor) -> None:
        """Replace a weight by one of its shape and dtype; what stands in the file itself waits for :meth:`save`."""
        tensor = self._tensors[name]
        place = _find_place(tensor)
        data = to_buffer(values)
        if place is None:
            tensor.ClearField("float_data")
            tensor.ClearField("double_data")
            tensor.ClearField("int32_data")
            tensor.raw_data = bytes(data)
            return
        location, offset, length = place
        if len(data) != length:
            raise ExportError(f"{self.path}: {name} takes {length} bytes, the new values {len(data)}")
        with (self.path.parent / location).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def save(self) -> None:
        """Write the graph back."""
        onnx.save(self.model, self.path)

    def _read_beside(self, location: str, offset: int, length: int) -> bytes:
        with (self.path.parent / location).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ExportError(f"{self.path.parent / location} ends after {offset + len(data)} bytes; it is truncated")
        return data


def to_buffer(values: torch.Tensor) -> memoryview:
    """The elements of a tensor, row by row, as they stand in files; nothing is copied if they lie so in memory."""
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _find_place(tensor: onnx.TensorProto) -> tuple[str, int, int] | None:
    """``(file, offset, length)`` of a tensor that stands beside the graph."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0))

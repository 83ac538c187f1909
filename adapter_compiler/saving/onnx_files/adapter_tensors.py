"""The tensors of an ``.onnx_adapter`` file: inputs of a file that was exported with ``adapters="runtime"``."""

from __future__ import annotations

import dataclasses
import errno
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy
import onnx
import onnxruntime
import torch
import torch.utils.dlpack

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.onnx_files.adapter_manifest import append_manifest, read_with_manifest

_ADAPTER_VERSION = 1
_MODEL_VERSION = 1
BFLOAT16 = "tensor(bfloat16)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        tensors: by name of the input.
        base: checksums of the base model's tensors, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    base: Mapping[str, str]


def input_names(weight: str) -> tuple[str, str]:
    """Names of the inputs A [in, r] and B [r, out] of a weight, with ΔWᵀ = A B."""
    return f"{weight}.adapter_A", f"{weight}.adapter_B"


def write_adapter_tensors(path: Path, tensors: Mapping[str, torch.Tensor], base: Mapping[str, str]) -> None:
    """Write the file itself.

    Args:
        path: the file.
        tensors: by name of the input.
        base: checksums of the base model's tensors, by name.

    Raises:
        OSError: its place cannot be written.
    """
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_ADAPTER_VERSION)
    adapter.set_model_version(_MODEL_VERSION)
    adapter.set_parameters({key: to_ort_value(tensor) for key, tensor in tensors.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # onnxruntime does not say why
        raise OSError(errno.EIO, f"onnxruntime fails to write {path.name}: {error}") from error
    append_manifest(path, base)


def read_adapter_file(path: str | Path) -> AdapterFile:
    """The content of an adapter file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    data, manifest = read_with_manifest(Path(path))
    with tempfile.TemporaryDirectory() as folder:
        # onnxruntime reads files only. It gets the bytes that were checked, whatever happens to the file meanwhile.
        checked = Path(folder) / "checked.onnx_adapter"
        checked.write_bytes(data)
        try:
            values = onnxruntime.AdapterFormat.read_adapter(str(checked)).get_parameters()
            tensors = {name: from_ort_value(value) for name, value in values.items()}
        except Exception as error:  # onnxruntime raises plain RuntimeErrors
            raise CheckpointError(
                f"{path}: onnxruntime cannot read its tensors ({' '.join(str(error).split())}), expected a file that "
                "save_onnx_adapter wrote; save it again"
            ) from error
    return AdapterFile(tensors=tensors, base=manifest["base"])


def to_ort_value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """The tensor for onnxruntime; numpy has no bfloat16, so that one goes by its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def from_ort_value(value: onnxruntime.OrtValue) -> torch.Tensor:
    """A copy of onnxruntime's value as a tensor."""
    if value.data_type() == BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value._ortvalue).clone()
    return torch.from_numpy(numpy.array(value.numpy()))

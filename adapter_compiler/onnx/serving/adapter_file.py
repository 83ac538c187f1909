"""Write and read ``.onnx_adapter`` files: what goes into a file exported with ``adapters="runtime"``."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch

from adapter_compiler.adapters.parameters.factors import assert_additive, factor_weight
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.verification.values import from_ort_value, to_ort_value
from adapter_compiler.saving.primitives.files import written_beside

_ADAPTER_VERSION = 1


def input_names(weight: str) -> tuple[str, str]:
    """Names of the inputs A [in, r] and B [r, out] of a weight, with ΔWᵀ = A B."""
    return f"{weight}.adapter_A", f"{weight}.adapter_B"


def save_onnx_adapter(adapted: AdaptedModel, path: str | Path, *, name: str | None = None) -> Path:
    """Write the adapters of ``adapted`` for a file that was exported with ``adapters="runtime"``.

    λ and the scale are folded in, pruned triplets are left out, so each weight has its own rank. Parameters
    that train fully (``AdapterConfig(trainable=...)``) go along.

    Args:
        adapted: the model.
        path: the file to write, usually named ``*.onnx_adapter``.
        name: which adapter of the model; by default the active one.

    Raises:
        ConfigError: ``adapted`` is no adapted model, has no adapter of this name, or one that is no low-rank addition
            (DoRA).
    """
    if not isinstance(adapted, AdaptedModel):
        raise ConfigError(f"save_onnx_adapter got a {type(adapted).__name__}, expected an AdaptedModel")
    with written_beside(path) as draft:
        write_adapter_file(adapted, draft, name)
    return Path(path)


def write_adapter_file(adapted: AdaptedModel, path: Path, name: str | None = None) -> Path:
    """Write the file itself.

    Raises:
        OSError: its place cannot be written.
    """
    tensors = find_adapter_tensors(adapted, name)
    values = {name: to_ort_value(tensor) for name, tensor in tensors.items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_ADAPTER_VERSION)
    adapter.set_model_version(hash_inputs({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # onnxruntime does not say why
        raise OSError(errno.EIO, f"onnxruntime fails to write {path.name}: {error}") from error
    return path


def find_adapter_tensors(adapted: AdaptedModel, name: str | None = None) -> dict[str, torch.Tensor]:
    """What goes into the file, by the name of the input, in the dtype of the weights."""
    name = adapted.active_adapter if name is None else name
    adapter_parameters, plan = adapted.parameters_of_adapter(name), adapted.adapter_set.plans[name]
    assert_additive(plan)
    tensors: dict[str, torch.Tensor] = {}
    for weight, adapters in plan.by_weight.items():
        left, right = factor_weight(adapters, adapter_parameters.parameters_of)
        first, second = input_names(weight)
        tensors[first] = right.t().contiguous().to(adapters[0].site.dtype)
        tensors[second] = left.t().contiguous().to(adapters[0].site.dtype)
    for site in {a.site.weight: a.site for plan in adapted.adapter_set.plans.values() for a in plan}.values():
        # A file whose adapters stand at more weights than this one's wants an input for each.
        first, second = input_names(site.weight)
        tensors.setdefault(first, torch.zeros(site.in_features, 0, dtype=site.dtype))
        tensors.setdefault(second, torch.zeros(0, site.weight_rows, dtype=site.dtype))
    inactive = adapted.adapter_set.find_inactive(name) or {}
    parameters = {key: p for key, p in adapted.module.named_parameters() if p.requires_grad}
    trained = {key: inactive.get(key, p).detach().cpu() for key, p in parameters.items()}
    return {**tensors, **trained}


def read_adapter_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = adapter.get_parameters()
        return {name: from_ort_value(value) for name, value in values.items()}
    except Exception as error:  # onnxruntime raises plain RuntimeErrors
        raise CheckpointError(
            f"{path} cannot be read as an .onnx_adapter file: {' '.join(str(error).split())}; expected a whole one; "
            "save it again"
        ) from error


def read_model_version(path: str | Path) -> int:
    """What :func:`hash_inputs` gave for the model that the file belongs to."""
    return int(onnxruntime.AdapterFormat.read_adapter(str(path)).get_model_version())


def hash_inputs(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A number for the set of adapter inputs and their widths, ranks apart; it fits 31 bits."""
    text = ";".join(f"{name}:{_drop_rank(name, shape)}" for name, shape in sorted(shapes.items()))
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def _drop_rank(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith(".adapter_A"):
        return shape[:1]
    return shape[1:] if name.endswith(".adapter_B") else shape

"""Write and read ``.onnx_adapter`` files: the inputs of a file that was exported with ``adapters="runtime"``."""

from __future__ import annotations

from pathlib import Path

import torch

from adapter_compiler.adapters.parameters.factors import assert_additive, factor_weight
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.serving.base_tensors import describe_base, find_trained_tensors
from adapter_compiler.saving.onnx_files.adapter_tensors import input_names, write_adapter_tensors
from adapter_compiler.saving.primitives.files import written_beside


def save_onnx_adapter(adapted: AdaptedModel, path: str | Path, *, name: str | None = None) -> Path:
    """Write the adapters of ``adapted`` for a file that was exported with ``adapters="runtime"``.

    λ and the scale are multiplied in and pruned triplets left out, so each weight has its own rank. What else training
    changes is in the file as well: parameters that train fully (``AdapterConfig(trainable=...)``) and persistent
    buffers such as running statistics. So are checksums of the base model's tensors, which
    :class:`~adapter_compiler.onnx.serving.session.OnnxAdapters` compares with those of the base file, and a checksum
    of the file itself.

    Args:
        adapted: the model.
        path: the file to write, usually named ``*.onnx_adapter``.
        name: which adapter of the model; by default the active one.

    Raises:
        ConfigError: ``adapted`` is no adapted model, has no adapter of this name, one that is no low-rank addition
            (DoRA), or a scalar that trains fully.
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
    write_adapter_tensors(path, tensors, describe_base(adapted, name))
    return path


def find_adapter_tensors(adapted: AdaptedModel, name: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of the file, by the name of the input, in the dtype of the weights."""
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
        # A base file for adapters at more weights than these has an input for each of them.
        first, second = input_names(site.weight)
        tensors.setdefault(first, torch.zeros(site.in_features, 0, dtype=site.dtype))
        tensors.setdefault(second, torch.zeros(0, site.weight_rows, dtype=site.dtype))
    return {**tensors, **find_trained_tensors(adapted, name)}

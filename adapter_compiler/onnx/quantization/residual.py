"""Keep the updates of some weights in float beside them: their base values go into few bits, ΔW into two factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from adapter_compiler.adapters.copies import share_unpacked
from adapter_compiler.adapters.parameters.factors import assert_additive
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.runtime_adapters import describe_site
from adapter_compiler.onnx.serving.adapter_file import find_adapter_tensors
from adapter_compiler.saving.onnx_files.large_weights import save_model
from passes.export.insert_onnx_adapters import insert_onnx_adapter


def write_residual(
    source: Path, target: Path, adapted: AdaptedModel, names: Collection[str], weights: Mapping[str, Any]
) -> None:
    """Copy a merged file, with W in place of W + ΔW at some weights, and ΔW as constant factors beside them.

    Args:
        source: the merged file in float.
        target: the file to write.
        adapted: the model that the source was exported from.
        names: the weights.
        weights: where the model's tensors are in the file.

    Raises:
        ConfigError: the model has no such adapter, or one that is no low-rank addition (DoRA).
    """
    assert_additive(adapted.plan)
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    factors = find_adapter_tensors(adapted)
    by_weight = adapted.plan.by_weight
    for name in names:
        if name not in by_weight:
            raise ConfigError(
                f"residual= has no adapter at {name}, which {source.name} has an update of; give the model that was "
                "exported"
            )
        site = describe_site(name, by_weight[name][0], weights)
        base = share_unpacked(adapted.base_weight(name)).detach().cpu().contiguous()
        tensors[site.initializer].CopyFrom(numpy_helper.from_array(base.numpy(), site.initializer))
        insert_onnx_adapter(model, site)
        added = {tensor.name: tensor for tensor in model.graph.initializer}
        for factor in (site.left, site.right):
            added[factor].CopyFrom(numpy_helper.from_array(factors[factor].contiguous().numpy(), factor))
            model.graph.input.remove(next(value for value in model.graph.input if value.name == factor))
    save_model(model, target)

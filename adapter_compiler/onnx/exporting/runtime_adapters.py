"""Adapters as inputs of the file: put them there, and verify the file with and without one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from adapter_compiler.errors import ExportError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.serving.adapter_file import input_names, write_adapter_file
from adapter_compiler.onnx.translation.exportable import NamedOutputs, prepare_base, prepare_merged
from adapter_compiler.onnx.verification.cases import VerificationCase
from adapter_compiler.onnx.verification.report import OutputError
from adapter_compiler.onnx.verification.verify import verify_cases
from passes.export.insert_onnx_adapters import OnnxSite, insert_onnx_adapter
from passes.planning.plan import PlannedAdapter


def add_runtime_adapters(draft: Path, adapted: AdaptedModel, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Give the base model's file an input for each factor of each adapter, and for each fully trained parameter.

    Args:
        draft: the file of the base model; edited in place.
        adapted: the model.
        weights: where its weights stand in the file.

    Returns:
        For the file's metadata: by weight, the names and widths of its inputs.

    Raises:
        ExportError: an adapted weight does not stand in the file as a whole.
    """
    model = onnx.load(draft, load_external_data=False)
    sites: dict[str, Any] = {}
    for name, (adapter, *_) in adapted.plan.by_weight.items():
        site = _describe_site(name, adapter, weights)
        insert_onnx_adapter(model, site)
        sites[name] = {
            "left": site.left,
            "right": site.right,
            "in": site.in_features,
            "out": site.out_features,
        }
    for name, parameter in adapted.module.named_parameters():
        if parameter.requires_grad:
            _open_weight(model, _find_initializer(name, weights))
    onnx.save(model, draft)
    return sites


def verify_runtime_adapters(
    session: onnxruntime.InferenceSession,
    adapted: AdaptedModel,
    cases: Sequence[VerificationCase],
    inputs: Sequence[str],
) -> tuple[list[OutputError], list[str]]:
    """Compare the file alone with the base model, and with the adapter active with the merged model.

    Raises:
        VerificationError: one of them departs.
    """
    base = NamedOutputs(prepare_base(adapted))
    errors, refused = verify_cases(session, cases, inputs, base.named_outputs)
    merged = NamedOutputs(prepare_merged(adapted))
    with tempfile.TemporaryDirectory() as folder:
        file = write_adapter_file(adapted, Path(folder) / "check.onnx_adapter")
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    active = [
        VerificationCase(name=f"{case.name}, adapter active", call=case.call, fallback=case.fallback) for case in cases
    ]
    more, _ = verify_cases(session, active, inputs, merged.named_outputs, options)
    return [*errors, *more], refused


def _describe_site(name: str, adapter: PlannedAdapter, weights: Mapping[str, Any]) -> OnnxSite:
    site = adapter.site
    left, right = input_names(name)
    return OnnxSite(
        initializer=_find_initializer(name, weights),
        out_features=site.weight_rows,
        in_features=site.in_features,
        transposed=site.transposed,
        left=left,
        right=right,
    )


def _find_initializer(name: str, weights: Mapping[str, Any]) -> str:
    if name not in weights:
        raise ExportError(
            f"weight {name} does not stand in the exported file as a whole, because the exporter folded it into "
            "something else or the model does not use it; leave it out (AdapterConfig(exclude=...)) or export "
            "with adapters='merged'"
        )
    return str(weights[name]["initializer"])


def _open_weight(model: onnx.ModelProto, name: str) -> None:
    """Let the caller override a weight: it becomes an input that has itself as default."""
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = onnx.helper.make_tensor_value_info(name, weight.data_type, list(weight.dims))
    if name not in {existing.name for existing in model.graph.input}:
        model.graph.input.append(value)

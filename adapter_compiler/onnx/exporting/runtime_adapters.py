"""Adapters as inputs of the file: put them there, and verify the file with and without them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from adapter_compiler.adapters.copies import share_unpacked
from adapter_compiler.errors import ExportError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.unused_tensors import change_tensor
from adapter_compiler.onnx.serving.adapter_file import find_adapter_tensors, write_adapter_file
from adapter_compiler.onnx.serving.base_tensors import describe_base, find_trained_tensors
from adapter_compiler.onnx.translation.exportable import NamedOutputs, prepare_base, prepare_merged
from adapter_compiler.onnx.verification.cases import VerificationCase
from adapter_compiler.onnx.verification.report import OutputError, SampleReport
from adapter_compiler.onnx.verification.samples.compare import Compare, SampleCheck, run_file, run_reference
from adapter_compiler.onnx.verification.verify import compare_outputs, compare_values, verify_cases
from adapter_compiler.saving.onnx_files.adapter_tensors import input_names
from passes.export.insert_onnx_adapters import OnnxSite, insert_onnx_adapter
from passes.planning.plan import PlannedAdapter

#: A check of a session against a model, with run options for an active adapter.
FurtherCheck = Callable[
    [onnxruntime.InferenceSession, NamedOutputs, onnxruntime.RunOptions | None], Sequence[OutputError]
]

#: Rank of the random adapters that a file is verified with, and their values' standard deviation.
_RANDOM_RANK, _RANDOM_SCALE = 2, 0.1


def add_runtime_adapters(
    draft: Path, adapted: AdaptedModel, weights: Mapping[str, Any], unused: Collection[str]
) -> dict[str, Any]:
    """Give the base model's file an input for each factor of each adapter, and for each other tensor that trains.

    Args:
        draft: the file of the base model; edited in place.
        adapted: the model.
        weights: where the base model's tensors are in the file.
        unused: tensors of it that the file does not need.

    Returns:
        For the file's metadata: ``sites``, by weight the names and widths of its inputs, and ``base``, checksums of
        the tensors that an adapter must have been trained on.

    Raises:
        ExportError: an adapted weight or another tensor that trains is not in the file as a whole.
    """
    model = onnx.load(draft, load_external_data=False)
    sites: dict[str, Any] = {}
    for name, (adapter, *_) in adapted.plan.by_weight.items():
        site = describe_site(name, adapter, weights)
        insert_onnx_adapter(model, site)
        sites[name] = {
            "left": site.left,
            "right": site.right,
            "in": site.in_features,
            "out": site.out_features,
        }
    _open_trained_tensors(model, find_trained_tensors(adapted), weights, unused)
    onnx.save(model, draft)
    base = {name: checksum for name, checksum in describe_base(adapted).items() if name not in unused}
    return {"sites": sites, "base": base}


def verify_runtime_adapters(
    session: onnxruntime.InferenceSession,
    adapted: AdaptedModel,
    cases: Sequence[VerificationCase],
    inputs: Sequence[str],
    exporter: NamedOutputs,
    further: FurtherCheck | None = None,
) -> list[OutputError]:
    """Compare the file alone with the base model, with the adapter with the merged model, and with random adapters.

    Args:
        session: the file, opened.
        adapted: the model.
        cases: the inputs.
        inputs: names of the file's inputs, in the order of the call's tensors.
        exporter: how the base model is called, and which of its outputs are in the file.
        further: one more check, of the file alone and of the file with the adapter.

    Raises:
        VerificationError: one of them differs.
    """
    base, merged = (exporter.around(one(adapted), exporter.left_out) for one in (prepare_base, prepare_merged))
    errors = verify_cases(session, cases, inputs, base.named_outputs).errors
    with tempfile.TemporaryDirectory() as folder:
        file = write_adapter_file(adapted, Path(folder) / "check.onnx_adapter")
        loaded = onnxruntime.LoraAdapter()  # must live as long as the options, which keep a bare pointer to it
        loaded.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    active = [_rename(case) for case in cases]
    errors += verify_cases(session, active, inputs, merged.named_outputs, options).errors
    if further is not None:
        errors += [*further(session, base, None), *further(session, merged, options)]
    return [*errors, *_verify_random_adapters(session, adapted, merged, cases[0], inputs)]


def verify_runtime_samples(
    session: onnxruntime.InferenceSession,
    adapted: AdaptedModel,
    check: SampleCheck,
    inputs: Sequence[str],
    exporter: NamedOutputs,
    compare: Compare = compare_values,
) -> list[SampleReport]:
    """Compare the file alone with the base model, and with the adapter with the merged model, on the user's data.

    ``compare`` gives the error of one output, and raises if it is not accepted.

    Raises:
        VerificationError: one of them differs.
    """
    adapter = find_adapter_tensors(adapted)
    return [
        check.compare(
            run_file(session, inputs, tensors),
            run_reference(exporter.around(model, exporter.left_out).named_outputs),
            subject=subject,
            compare=compare,
        )
        for subject, model, tensors in (
            ("base model", prepare_base(adapted), None),
            ("adapter active", prepare_merged(adapted), adapter),
        )
    ]


@torch.no_grad()
def _verify_random_adapters(
    session: onnxruntime.InferenceSession,
    adapted: AdaptedModel,
    merged: NamedOutputs,
    example: VerificationCase,
    inputs: Sequence[str],
) -> list[OutputError]:
    """Compare the file with the merged model on random adapters and other values of all else that trains.

    The model's own adapter may be all zeros, and what else trains still has the values that the file has by default.
    ``merged`` is overwritten.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {**dict(merged.module.named_parameters()), **dict(merged.module.named_buffers())}
    feeds = dict(zip(inputs, example.call.tensors, strict=True))
    for name in find_trained_tensors(adapted):
        feeds[name] = tensors[name].copy_(change_tensor(tensors[name]))
    for name, (adapter, *_) in adapted.plan.by_weight.items():
        site = dataclasses.replace(adapter.site, rows=None)
        left = torch.randn(site.in_features, _RANDOM_RANK, generator=generator) * _RANDOM_SCALE
        right = torch.randn(_RANDOM_RANK, site.weight_rows, generator=generator) * _RANDOM_SCALE
        first, second = input_names(name)
        feeds[first], feeds[second] = left.to(site.dtype), right.to(site.dtype)
        base = share_unpacked(adapted.base_weight(name)).detach().cpu()
        tensors[name].copy_(base + site.from_matrix((left @ right).t()).to(base.dtype))
    case = f"{example.name}, random adapters"
    return compare_outputs(session, case, feeds, merged.named_outputs(example.call))


def _rename(case: VerificationCase) -> VerificationCase:
    alternatives = tuple(map(_rename, case.alternatives))
    return dataclasses.replace(case, name=f"{case.name}, adapter active", alternatives=alternatives)


def describe_site(name: str, adapter: PlannedAdapter, weights: Mapping[str, Any]) -> OnnxSite:
    """The place of an adapter in a file.

    Args:
        name: the weight.
        adapter: its adapter.
        weights: where the model's tensors are in the file.

    Raises:
        ExportError: the weight is not in the file as a whole.
    """
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
            f"weight {name} is not in the exported file as a whole, because the exporter folded it into something else "
            "or the model does not use it; leave it out (AdapterConfig(exclude=...)) or export with adapters='merged'"
        )
    return str(weights[name]["initializer"])


def _open_trained_tensors(
    model: onnx.ModelProto, trained: Mapping[str, torch.Tensor], weights: Mapping[str, Any], unused: Collection[str]
) -> None:
    """Make inputs of the tensors that train besides adapters, with their present values as defaults."""
    for name, tensor in trained.items():
        if name in unused:
            # Without a node that reads it, so that adapter files need not know which tensors a call uses.
            model.graph.initializer.append(_to_initializer(name, tensor))
        elif name not in weights or weights[name]["initializer"] != name:
            raise ExportError(
                f"{name} changes in training, but the exported file cannot take it as an input: the exporter folded it "
                "into something else, or an input has the same name; export with adapters='merged'"
            )
        _open_initializer(model, name)


def _to_initializer(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
    values = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        data = values.view(torch.int16).numpy().tobytes()
        return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, list(tensor.shape), data, raw=True)
    return onnx.numpy_helper.from_array(values.numpy(), name)


def _open_initializer(model: onnx.ModelProto, name: str) -> None:
    """Let the caller override a weight: it becomes an input that has itself as default."""
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = onnx.helper.make_tensor_value_info(name, weight.data_type, list(weight.dims))
    if name not in {existing.name for existing in model.graph.input}:
        model.graph.input.append(value)

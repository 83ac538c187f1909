"""Verify an existing file against a PyTorch model, as an export does."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.runtime_adapters import verify_runtime_adapters, verify_runtime_samples
from adapter_compiler.onnx.translation.exportable import NamedOutputs, prepare_call
from adapter_compiler.onnx.translation.fallbacks import find_strategies, write_draft
from adapter_compiler.onnx.verification.bisect import describe_first_difference
from adapter_compiler.onnx.verification.cases import DRAWS, choose_variety, find_cases
from adapter_compiler.onnx.verification.compare_files import check_file, measure_within
from adapter_compiler.onnx.verification.fixed_draws import open_with_fixed_draws
from adapter_compiler.onnx.verification.inputs import spell_names
from adapter_compiler.onnx.verification.report import OutputError, SampleReport
from adapter_compiler.onnx.verification.samples.compare import Metric, SampleCheck, make_check, run_file, run_reference
from adapter_compiler.onnx.verification.verify import MismatchError, open_session, verify_cases
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import read_metadata
from passes.capture.calls import ModuleCall
from passes.capture.capture import DimensionBound
from passes.capture.module_state import canonical_kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileVerification:
    """The result of comparing a file with PyTorch.

    Attributes:
        path: the file.
        errors: one entry for each output on each input.
        not_verified: inputs that the model itself refuses.
        samples: how the file does on the samples that were given; for run-time adapters, alone and with them.
    """

    path: Path
    errors: tuple[OutputError, ...]
    not_verified: tuple[str, ...]
    samples: tuple[SampleReport, ...] = ()


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    draws: int = DRAWS,
    samples: Iterable[Any] | None = None,
    metric: Metric | None = None,
) -> FileVerification:
    """Compare an ONNX file with a model on the example, on other sizes of its open dimensions, and on random inputs.

    The inputs are those that ``export_onnx`` verifies on. The file's own record says whether adapters were
    merged into it; a file without a record (of another exporter, or edited) is compared with the merged model,
    by its names of inputs and outputs. A quantized file is compared on ``samples``, or else on the example, within the
    difference that was accepted when it was written.

    Args:
        path: the file; it is only read.
        model: an adapted model, or any module; it is not changed.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        draws: random inputs.
        samples: your own data, as in ``export_onnx``.
        metric: with ``samples``, a function ``metric(outputs, batch)``, as in ``export_onnx``.

    Raises:
        ExportError: the file is missing or damaged.
        ConfigError: its inputs or outputs are not the model's.
        VerificationError: it differs from PyTorch; the message names the output and, where the file was translated
            node by node, the first node that differs.
    """
    path = Path(path)
    check_file(path)
    session = open_session(path)
    record = _read_record(path)
    kind = record.get("adapters", "merged")
    with canonical_kernels(), torch.no_grad():
        exporter, call = prepare_call(model, example_args, example_kwargs, merged=kind == "merged")
        inputs = spell_names(call.names)
        check = make_check(samples, metric, call)
        left_out = record.get("left_out", {}).get("outputs", ())
        exporter = NamedOutputs(exporter.module, left_out)
        outputs = [name for name, _ in exporter.named_outputs(call)]
        _assert_same_names(path, session, inputs, outputs)
        is_runtime = kind == "runtime" and isinstance(model, AdaptedModel)
        if "quantized" in record:
            args, kwargs = call.rebuild(call.tensors)
            check = check or make_check([kwargs or args], None, call)
            assert check is not None
            return _verify_quantized(path, session, record, model, exporter, check, inputs)
        is_traced = str(record.get("strategy", "")).startswith("TorchScript")
        draws, factors = choose_variety(draws, is_traced=is_traced, is_frozen=bool(record.get("frozen")))
        cases = list(find_cases(call, _read_bounds(session, inputs, call), draws=draws, factors=factors))
        fixed_session, reference, _ = open_with_fixed_draws(path, session, exporter.named_outputs)
        found: list[SampleReport] = []
        try:
            verified = verify_cases(fixed_session, cases, inputs, reference)
            if check is not None and not is_runtime:
                found = [check.compare(run_file(fixed_session, inputs), run_reference(reference))]
        except MismatchError as error:
            culprit = _find_culprit(error, path, record, exporter, call, inputs, outputs)
            raise VerificationError(f"{path.name}: {error}{culprit}") from error
        if kind == "runtime" and isinstance(model, AdaptedModel):
            verified.errors.extend(verify_runtime_adapters(session, model, cases, inputs, exporter))
            found = [] if check is None else verify_runtime_samples(session, model, check, inputs, exporter)
    return FileVerification(
        path=path,
        errors=tuple(verified.errors),
        not_verified=tuple(case.name for case in verified.refused),
        samples=tuple(found),
    )


def _verify_quantized(
    path: Path,
    session: onnxruntime.InferenceSession,
    record: Mapping[str, Any],
    model: nn.Module,
    exporter: NamedOutputs,
    check: SampleCheck,
    inputs: Sequence[str],
) -> FileVerification:
    """Compare a quantized file, within the difference that was accepted when it was written."""
    limit = measure_within(record["quantized"]["largest_rel_error"], record["quantized"]["kind"])
    if record.get("adapters") == "runtime" and isinstance(model, AdaptedModel):
        found = verify_runtime_samples(session, model, check, inputs, exporter, limit)
    else:
        reference = run_reference(exporter.named_outputs)
        found = [check.compare(run_file(session, inputs), reference, compare=limit)]
    return FileVerification(path=path, errors=(), not_verified=(), samples=tuple(found))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_metadata(InitializerFile(path).header, path.name)
    except ExportError:
        return {}


def _assert_same_names(
    path: Path, session: onnxruntime.InferenceSession, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    taken = [value.name for value in session.get_inputs()]
    given = [value.name for value in session.get_outputs()]
    if strange := [name for name in taken if name not in inputs]:
        raise ConfigError(
            f"{path.name} has an input {strange[0]}, the model's call gives {', '.join(inputs) or 'none'}; "
            "give the arguments that it was exported with"
        )
    if missing := [name for name in outputs if name not in given]:
        raise ConfigError(
            f"{path.name} has no output {missing[0]}, which the model returns; it has {', '.join(given)}; "
            "it was exported from another model or another call"
        )


def _read_bounds(
    session: onnxruntime.InferenceSession, inputs: Sequence[str], call: ModuleCall
) -> list[tuple[DimensionBound, ...]]:
    """The sizes that the file declares; an input that it does not have follows the others of its size."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    symbols: dict[tuple[int, int], str] = {}
    for name, tensor in zip(inputs, call.tensors, strict=True):
        for dimension, size in enumerate(shapes.get(name, ())):
            if not isinstance(size, int):
                symbols.setdefault((dimension, tensor.shape[dimension]), str(size or f"{name}_{dimension}"))
    found = []
    for name, tensor in zip(inputs, call.tensors, strict=True):
        declared = shapes.get(name, [None] * tensor.dim())
        bounds = []
        for dimension, (size, shown) in enumerate(zip(tensor.shape, declared, strict=True)):
            symbol = None if isinstance(shown, int) else shown or symbols.get((dimension, size))
            limits = (size, size) if symbol is None else (2, float("inf"))
            bounds.append(DimensionBound(symbol=symbol, least=int(limits[0]), greatest=limits[1]))
        found.append(tuple(bounds))
    return found


def _find_culprit(
    error: MismatchError,
    path: Path,
    record: Mapping[str, Any],
    exporter: NamedOutputs,
    call: ModuleCall,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> str:
    """The first node that differs, by exporting the model once more in the way that the file records.

    Another torch may name nodes otherwise, so nothing is said about a file of one.
    """
    strategies = {strategy.name: strategy for strategy in find_strategies(exporter.module)}
    strategy = strategies.get(str(record.get("strategy")))
    if strategy is None or record["versions"]["torch"] != torch.__version__:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = write_draft(strategy, exporter, call, Path(folder) / path.name, inputs, outputs, opset=None)
        except ExportError:
            return ""
    return describe_first_difference(path, written.program, inputs, error.tensors)

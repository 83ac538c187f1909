"""fold → export → ONNX → onnx.checker → onnxruntime against PyTorch, or no file at all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.parameters.factors import assert_additive
from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.casting import open_with_casts
from adapter_compiler.onnx.exporting.runtime_adapters import add_runtime_adapters, verify_runtime_adapters
from adapter_compiler.onnx.exporting.weights import map_weights
from adapter_compiler.onnx.translation.exportable import NamedOutputs, prepare_call
from adapter_compiler.onnx.translation.fallbacks import Strategy, WrittenDraft, find_strategies, write_draft
from adapter_compiler.onnx.translation.opsets import check_opset
from adapter_compiler.onnx.verification.bisect import describe_first_departure
from adapter_compiler.onnx.verification.cases import DRAWS, choose_variety, find_cases
from adapter_compiler.onnx.verification.fixed_draws import open_with_fixed_draws
from adapter_compiler.onnx.verification.inputs import spell_names
from adapter_compiler.onnx.verification.report import ExportAttempt, ExportReport, OutputError
from adapter_compiler.onnx.verification.verify import DepartureError, assert_comparable, verify_cases
from adapter_compiler.saving.onnx_files.metadata import describe_file, write_metadata
from adapter_compiler.saving.primitives.files import written_beside
from passes.capture.calls import ModuleCall, describe_refusal
from passes.capture.module_state import canonical_kernels

logger = logging.getLogger(__name__)


def export_onnx(
    adapted_or_model: nn.Module,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int | None = None,
    adapters: str = "merged",
) -> ExportReport:
    """Export a model in eval mode to ONNX and verify the file.

    Inputs are named after ``forward``'s arguments, outputs after the keys of what it returns. Dimensions are
    left open as far as the model allows. The file is compared with PyTorch on the example, on another batch
    size, at another size of every other open dimension, and on random inputs in the example's ranges; it is
    written beside ``path`` and renamed only when all checks pass. Where one way of exporting fails, the next
    is tried (see :mod:`adapter_compiler.onnx.translation.fallbacks`); the report lists them.

    Args:
        adapted_or_model: an adapted model, or any module; it is not changed.
        path: the file to write.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        opset: the ONNX operator set, from 7 to 25; by default the exporter's.
        adapters: ``"merged"`` folds them into the weights. ``"runtime"`` leaves an input for each of them, with
            a default of rank 0, so that the file alone is the base model and
            :func:`~adapter_compiler.onnx.serving.adapter_file.save_onnx_adapter` writes what goes in.
            DoRA cannot be one.

    Returns:
        A report with ``path``, ``max_abs_error`` and the error of each output on each input.

    Raises:
        ConfigError: an option has a value that cannot work, or adapters are no low-rank additions.
        ExportError: the model does not export; no file is left.
        VerificationError: the file does not load or departs from PyTorch; no file is left.
    """
    check_opset(opset)
    _assert_adapters(adapted_or_model, adapters)
    exporter, call = prepare_call(adapted_or_model, example_args, example_kwargs, merged=adapters == "merged")
    attempts: list[ExportAttempt] = []
    first: ExportError | None = None
    with canonical_kernels(), torch.no_grad():
        names = _Names(inputs=spell_names(call.names), outputs=[name for name, _ in _run_example(exporter, call)])
        for strategy in find_strategies(exporter.module):
            try:
                with written_beside(path) as draft:
                    result = _attempt(strategy, adapted_or_model, exporter, call, draft, names, opset, adapters)
            except ExportError as error:
                logger.info("%s failed: %s", strategy.name, error)
                attempts.append(ExportAttempt(strategy=strategy.name, reason=str(error)))
                first = first or error
                continue
            attempts.append(ExportAttempt(strategy=strategy.name, reason=None))
            return _report(adapted_or_model, Path(path), names, strategy, attempts, result, adapters)
    assert first is not None
    others = [f"{a.strategy}: {a.reason}" for a in attempts[1:] if a.reason != attempts[0].reason]
    kind = VerificationError if isinstance(first, VerificationError) else ExportError
    raise kind("; also tried: ".join([str(first), *others])) from first


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    inputs: list[str]
    outputs: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    written: WrittenDraft
    errors: list[OutputError]
    refused: list[str]
    casts: tuple[str, ...]
    drawing: int


def _assert_adapters(model: nn.Module, adapters: str) -> None:
    if adapters not in ("merged", "runtime"):
        raise ConfigError(f"export_onnx(adapters={adapters!r}): expected 'merged' or 'runtime'")
    if adapters == "runtime" and not isinstance(model, AdaptedModel):
        raise ConfigError(
            f"export_onnx(adapters='runtime') got a {type(model).__name__}, expected an AdaptedModel; "
            "compile_with_adapters makes one"
        )
    if adapters == "runtime" and isinstance(model, AdaptedModel):
        assert_additive(model.plan)


def _run_example(exporter: NamedOutputs, call: ModuleCall) -> list[tuple[str, torch.Tensor]]:
    """The example's outputs; without finite values no file could be verified, so nothing is exported."""
    try:
        expected = exporter.named_outputs(call)
    except Exception as error:  # the model's own code raises what it likes
        raise ExportError(describe_refusal(exporter.module, *call.rebuild(call.tensors), error)) from error
    if not expected:
        raise ExportError(
            f"{type(exporter.module).__name__} returns no tensor that a file could give; expected a tensor, or tuples, "
            "dicts or dataclasses of some; return one, or register the class with torch.utils._pytree"
        )
    for name, tensor in expected:
        assert_comparable("example", name, tensor)
    return expected


def _attempt(
    strategy: Strategy,
    model: nn.Module,
    exporter: NamedOutputs,
    call: ModuleCall,
    draft: Path,
    names: _Names,
    opset: int | None,
    adapters: str,
) -> _Result:
    written = write_draft(strategy, exporter, call, draft, names.inputs, names.outputs, opset=opset)
    session, casts = open_with_casts(draft)
    draws, factors = choose_variety(DRAWS, is_traced=written.program is None, is_frozen=bool(written.frozen))
    cases = list(find_cases(call, written.bounds, draws=draws, factors=factors))
    session, reference, drawing = open_with_fixed_draws(draft, session, exporter.named_outputs)
    try:
        errors, refused = verify_cases(session, cases, names.inputs, reference)
    except DepartureError as error:
        tensors = next(case.call.tensors for case in cases if case.name == error.case)
        culprit = describe_first_departure(draft, written.program, names.inputs, tensors)
        raise VerificationError(f"{error}{culprit}") from error
    kind = adapters if isinstance(model, AdaptedModel) else "none"
    description = describe_file(model, call, names.inputs, adapters=kind, strategy=strategy.name)
    kept = [f"buffer {name}, which a call of the model changes" for name in exporter.find_written_buffers(call)]
    written = dataclasses.replace(written, frozen=(*written.frozen, *kept))
    description["frozen"] = list(written.frozen)
    description["weights"] = map_weights(draft, exporter.module)
    if adapters == "runtime":
        assert isinstance(model, AdaptedModel)
        description["sites"] = add_runtime_adapters(draft, model, description["weights"])
        write_metadata(draft, description)
        more, _ = verify_runtime_adapters(open_with_casts(draft)[0], model, cases, names.inputs)
        errors += more
    else:
        write_metadata(draft, description)
    return _Result(written=written, errors=errors, refused=refused, casts=casts, drawing=drawing)


def _report(
    model: nn.Module,
    path: Path,
    names: _Names,
    strategy: Strategy,
    attempts: list[ExportAttempt],
    result: _Result,
    adapters: str,
) -> ExportReport:
    is_adapted = isinstance(model, AdaptedModel)
    return ExportReport(
        path=path,
        inputs=tuple(names.inputs),
        outputs=tuple(names.outputs),
        dynamic=strategy.dynamic,
        dynamic_axes={
            name: tuple(i for i, bound in enumerate(bounds) if bound.symbol is not None)
            for name, bounds in zip(names.inputs, result.written.bounds, strict=True)
        },
        opset=result.written.opset,
        errors=tuple(result.errors),
        not_verified=tuple(result.refused),
        fold=model.fold_report if isinstance(model, AdaptedModel) and adapters == "merged" else None,
        attempts=tuple(attempts),
        frozen=result.written.frozen,
        casts=result.casts,
        drawing=result.drawing,
        adapters=adapters if is_adapted else "none",
    )

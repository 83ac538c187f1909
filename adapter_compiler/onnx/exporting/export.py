"""Fold, export to ONNX, check with onnx.checker, and compare with PyTorch on onnxruntime; or write no file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.config.progress import progress, tell
from adapter_compiler.errors import ExportError, VerificationError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.branches import find_untaken_branches
from adapter_compiler.onnx.exporting.casting import open_with_casts
from adapter_compiler.onnx.exporting.closed_sizes import close_sizes
from adapter_compiler.onnx.exporting.dimension_names import name_dimensions, set_dimension_names
from adapter_compiler.onnx.exporting.needless_inputs import LeftOut, leave_out_needless
from adapter_compiler.onnx.exporting.runtime_adapters import (
    add_runtime_adapters,
    verify_runtime_adapters,
    verify_runtime_samples,
)
from adapter_compiler.onnx.exporting.task import ExportTask, assert_adapters, make_task
from adapter_compiler.onnx.exporting.unused_tensors import find_folded_tensors
from adapter_compiler.onnx.exporting.weights import map_weights, measure_updates
from adapter_compiler.onnx.provenance.base_weights import hash_base_weights
from adapter_compiler.onnx.provenance.write import Provenance, write_provenance
from adapter_compiler.onnx.translation.exportable import NamedOutputs, prepare_call
from adapter_compiler.onnx.translation.fallbacks import (
    Strategy,
    WrittenDraft,
    find_strategies,
    is_redundant,
    write_draft,
)
from adapter_compiler.onnx.translation.opsets import check_opset
from adapter_compiler.onnx.verification.bisect import describe_first_difference
from adapter_compiler.onnx.verification.cases import DRAWS, VerificationCase, choose_variety, find_cases
from adapter_compiler.onnx.verification.fixed_draws import open_with_fixed_draws
from adapter_compiler.onnx.verification.report import (
    ExportAttempt,
    ExportReport,
    OutputError,
    SampleReport,
    summarize_verification,
)
from adapter_compiler.onnx.verification.samples.compare import (
    Metric,
    SampleCheck,
    make_check,
    run_file,
    run_reference,
)
from adapter_compiler.onnx.verification.verify import MismatchError, Verification, verify_cases
from adapter_compiler.saving.onnx_files.large_weights import embed_weights
from adapter_compiler.saving.onnx_files.metadata import (
    append_verification,
    describe_file,
    describe_tensor,
    write_metadata,
)
from adapter_compiler.saving.primitives.files import written_beside
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
    samples: Iterable[Any] | None = None,
    metric: Metric | None = None,
    provenance: Provenance | None = None,
) -> ExportReport:
    """Export a model in eval mode to ONNX and verify the file.

    Inputs have the names of ``forward``'s arguments, outputs the keys of what it returns, as ``output.<key>`` if an
    input has that name. What inference does not need is left out: inputs that no output depends on, and a loss with
    the labels that only it needs. Dimensions are left open as far as the model allows, and have names.

    The file is compared with PyTorch on the example, on another batch size, at another size of every other open
    dimension, and on random inputs in the example's ranges; it is written beside ``path`` and renamed only when all
    checks pass. If one strategy fails, the next is tried (see :mod:`adapter_compiler.onnx.translation.fallbacks`); the
    report lists them.

    Args:
        adapted_or_model: an adapted model, or any module; it is not changed.
        path: the file to write.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        opset: the ONNX operator set, from 7 to 25; by default the exporter's.
        adapters: ``"merged"`` folds them into the weights. ``"runtime"`` leaves an input for each of them, with
            a default of rank 0, so that the file alone is the base model and
            :func:`~adapter_compiler.onnx.serving.adapter_file.save_onnx_adapter` writes files of adapters for it.
            What else training changes are inputs as well. DoRA is not possible.
        samples: your own data, to compare onnxruntime with PyTorch on as well: a list, a generator, a DataLoader or a
            Dataset. A batch is a tensor, a tuple of positional arguments, or a dict of arguments; labels may come after
            them, as in ``(inputs, labels)``, and keys that the example does not have are not given to the model.
            Single rows are put together into batches of the example's size.
        metric: with ``samples``, a function ``metric(outputs, batch)`` of a dict of tensors (a bare tensor that the
            model returns is called ``output``) and the whole batch, to a number or a dict of numbers. The report has
            the mean over the batches, by their rows, of PyTorch and of onnxruntime.
        provenance: a model card, a bill of materials and a signature to write beside the file, with it or not at all;
            see :class:`~adapter_compiler.onnx.provenance.write.Provenance`.

    Returns:
        A report with ``path``, ``max_abs_error`` and the error of each output on each input.

    Raises:
        ConfigError: an option has a value that cannot work, or adapters are not low-rank additions.
        ExportError: the model does not export; no file is left.
        MissingDependencyError: ``provenance`` needs a package that is not installed.
        VerificationError: the file does not load or differs from PyTorch; no file is left.
    """
    check_opset(opset)
    assert_adapters(adapted_or_model, adapters)
    if provenance is not None:
        provenance.assert_ready()
    with progress(f"export {Path(path).name}"):
        return _export(
            adapted_or_model, Path(path), example_args, example_kwargs, opset, adapters, samples, metric, provenance
        )


def _export(
    adapted_or_model: nn.Module,
    path: Path,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
    opset: int | None,
    adapters: str,
    samples: Iterable[Any] | None,
    metric: Metric | None,
    provenance: Provenance | None,
) -> ExportReport:
    exporter, call = prepare_call(adapted_or_model, example_args, example_kwargs, merged=adapters == "merged")
    check = make_check(samples, metric, call)
    task = make_task(adapted_or_model, exporter, call, opset=opset, adapters=adapters, check=check)
    task = dataclasses.replace(task, provenance=provenance)
    return export_task(task, path, find_strategies(exporter.module))


def export_task(task: ExportTask, path: Path, strategies: Sequence[Strategy]) -> ExportReport:
    """Try strategies until the file of one is verified.

    Raises:
        ExportError: none writes a file.
        VerificationError: the first one writes a file that differs, and no other a right one.
    """
    attempts: list[ExportAttempt] = []
    first: ExportError | None = None
    with canonical_kernels(), torch.no_grad():
        for strategy in strategies:
            if is_redundant(strategy, task.sizes):
                continue
            try:
                with written_beside(path) as draft:
                    result = _attempt(task, strategy, draft)
                    if task.provenance is not None:
                        write_provenance(draft, task.provenance)
            except ExportError as error:
                logger.info("%s failed: %s", strategy.name, error)
                attempts.append(ExportAttempt(strategy=strategy.name, reason=str(error)))
                first = first or error
                continue
            attempts.append(ExportAttempt(strategy=result.strategy.name, reason=None))
            return _report(task, path, attempts, result)
    assert first is not None
    others = [f"{a.strategy}: {a.reason}" for a in attempts[1:] if a.reason != attempts[0].reason]
    kind = VerificationError if isinstance(first, VerificationError) else ExportError
    raise kind("; also tried: ".join([str(first), *others])) from first


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    """What one strategy wrote, and how it was verified."""

    strategy: Strategy
    written: WrittenDraft
    verified: Verification
    casts: tuple[str, ...]
    drawing: int
    left_out: LeftOut
    sizes: Mapping[str, tuple[int | str, ...]]
    samples: Sequence[SampleReport]
    untaken: tuple[str, ...]


def _attempt(task: ExportTask, strategy: Strategy, draft: Path) -> _Result:
    """Write a file, verify it, and put its description into it."""
    tell(f"write by {strategy.name}")
    written = write_draft(
        strategy, task.exporter, task.call, draft, task.inputs, task.outputs, opset=task.opset, sizes=task.sizes
    )
    left_out = leave_out_needless(draft)
    exporter = task.exporter.around(task.exporter.module, left_out.outputs)
    session, casts = open_with_casts(draft)
    cases = _choose_cases(task, written)
    session, reference, drawing = open_with_fixed_draws(draft, session, exporter.named_outputs)
    try:
        verified = verify_cases(session, cases, task.inputs, reference)
    except MismatchError as error:
        culprit = describe_first_difference(draft, written.program, task.inputs, error.tensors)
        raise VerificationError(f"{error}{culprit}") from error
    written = close_sizes(draft, written, task.call, task.inputs, verified.refused_places)
    kept = [
        f"buffer {name}, which a call of the model changes" for name in task.exporter.find_written_buffers(task.call)
    ]
    written = dataclasses.replace(written, frozen=(*written.frozen, *kept))
    strategy = strategy if written.is_open else dataclasses.replace(strategy, dynamic="none")
    if task.contract is None:
        sizes = name_dimensions(draft, task.sizes, task.inputs)
    else:
        sizes = set_dimension_names(draft, task.contract.dimensions)
        if task.adapters != "runtime":  # there the finished file is checked
            verified.errors.extend(task.contract.check(session, exporter, None))
    del session  # it may have the file open
    verified.errors.extend(_finish_file(task, exporter, strategy, written, draft, cases, left_out))
    embed_weights(draft)
    samples = [] if task.check is None else _verify_samples(task, task.check, draft, exporter, written.program)
    names = {error.case for error in verified.errors}
    refused = [case.name for case in verified.refused if not case.places]
    append_verification(draft, summarize_verification("PyTorch", verified.errors, samples, refused))
    untaken = find_untaken_branches(draft, cases, task.inputs, names) if written.has_branches else ()
    return _Result(
        strategy=strategy,
        written=written,
        verified=verified,
        casts=casts,
        drawing=drawing,
        left_out=left_out,
        sizes=sizes,
        samples=samples,
        untaken=untaken,
    )


def _verify_samples(
    task: ExportTask, check: SampleCheck, draft: Path, exporter: NamedOutputs, program: Any
) -> list[SampleReport]:
    """Compare the finished file with PyTorch on the user's data."""
    session = open_with_casts(draft)[0]
    try:
        if task.adapters == "runtime" and isinstance(task.model, AdaptedModel):
            return verify_runtime_samples(session, task.model, check, task.inputs, exporter)
        session, reference, _ = open_with_fixed_draws(draft, session, exporter.named_outputs)
        return [check.compare(run_file(session, task.inputs), run_reference(reference))]
    except MismatchError as error:
        culprit = describe_first_difference(draft, program, task.inputs, error.tensors)
        raise VerificationError(f"{error}{culprit}") from error


def _choose_cases(task: ExportTask, written: WrittenDraft) -> list[VerificationCase]:
    if task.contract is not None:
        return list(task.contract.cases)
    is_traced = written.program is None or written.has_branches
    draws, factors = choose_variety(DRAWS, is_traced=is_traced, is_frozen=bool(written.frozen) or written.has_branches)
    return list(find_cases(task.call, written.bounds, draws=draws, factors=factors))


def _finish_file(
    task: ExportTask,
    exporter: NamedOutputs,
    strategy: Strategy,
    written: WrittenDraft,
    draft: Path,
    cases: Sequence[VerificationCase],
    left_out: LeftOut,
) -> list[OutputError]:
    """Describe the file in its metadata, and give it inputs for adapters if it is to have them; further errors."""
    description = describe_file(task.model, task.call, task.inputs, adapters=task.adapters, strategy=strategy.name)
    description["frozen"] = list(written.frozen)
    description["left_out"] = {"inputs": list(left_out.inputs), "outputs": list(left_out.outputs)}
    description["inputs"] = {k: one for k, one in description["inputs"].items() if k not in left_out.inputs}
    description["base_weights"] = hash_base_weights(task.model)
    weights = description["weights"] = map_weights(draft, task.exporter.module)
    if task.adapters == "merged" and isinstance(task.model, AdaptedModel):
        description["updates"] = measure_updates(task.model, task.exporter.module)
    if task.adapters == "merged":
        write_metadata(draft, description)
        return []
    folded, unused = find_folded_tensors(task.exporter, task.call, weights)
    description["folded"] = {name: describe_tensor(tensor) for name, tensor in folded.items()}
    if not isinstance(task.model, AdaptedModel):
        write_metadata(draft, description)
        return []
    description |= add_runtime_adapters(draft, task.model, weights, unused)
    write_metadata(draft, description)
    check = None if task.contract is None else task.contract.check
    return verify_runtime_adapters(open_with_casts(draft)[0], task.model, cases, task.inputs, exporter, check)


def _report(task: ExportTask, path: Path, attempts: list[ExportAttempt], result: _Result) -> ExportReport:
    model, bounds, left_out = task.model, result.written.bounds, result.left_out
    return ExportReport(
        path=path,
        inputs=tuple(name for name in task.inputs if name not in left_out.inputs),
        outputs=tuple(name for name in task.outputs if name not in left_out.outputs),
        dynamic=result.strategy.dynamic,
        dynamic_axes={
            name: tuple(i for i, bound in enumerate(one) if bound.symbol is not None)
            for name, one in zip(task.inputs, bounds, strict=True)
            if name not in left_out.inputs
        },
        sizes=result.sizes,
        left_out=(*left_out.inputs, *left_out.outputs),
        opset=result.written.opset,
        errors=tuple(result.verified.errors),
        not_verified=tuple(case.name for case in result.verified.refused if not case.places),
        fold=model.fold_report if isinstance(model, AdaptedModel) and task.adapters == "merged" else None,
        attempts=tuple(attempts),
        frozen=result.written.frozen,
        casts=result.casts,
        drawing=result.drawing,
        untaken=result.untaken,
        adapters=task.adapters,
        samples=tuple(result.samples),
    )

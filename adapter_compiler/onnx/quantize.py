"""Smaller copies of exported files, and the measured loss of accuracy."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.quantization.certify import (
    WeightRounding,
    assert_not_swallowed,
    find_swallowed,
    measure_rounding,
)
from adapter_compiler.onnx.quantization.float16 import write_float16
from adapter_compiler.onnx.quantization.formats import (
    CALIBRATION_BATCHES,
    find_equal,
    write_4bit,
    write_dynamic,
    write_static,
)
from adapter_compiler.onnx.quantization.prepare import Prepared, prepare
from adapter_compiler.onnx.quantization.report import QuantizationReport
from adapter_compiler.onnx.quantization.residual import write_residual
from adapter_compiler.onnx.verification.compare_files import (
    check_file,
    draw_feeds,
    make_example,
    measure_values,
    read_input_ranges,
)
from adapter_compiler.onnx.verification.report import OutputError, SampleReport, summarize_verification
from adapter_compiler.onnx.verification.samples.compare import Metric, SampleCheck, make_check, run_file
from adapter_compiler.onnx.verification.verify import open_session
from adapter_compiler.saving.onnx_files.adapter_tensors import read_adapter_file
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.large_weights import save_model
from adapter_compiler.saving.onnx_files.metadata import append_verification, read_metadata, read_updates, set_metadata
from adapter_compiler.saving.primitives.files import written_beside
from passes.capture.quiet import quiet_loggers

#: The kinds of files, and the largest accepted difference of each, divided by the largest value of its output.
KINDS: Mapping[str, float] = {"int8": 0.25, "int8-static": 0.25, "int4": 0.5, "float16": 0.01}
#: Batches on which kinds are searched for that need float32, and calibration methods compared.
_SEARCH_BATCHES = 4


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    *,
    kind: str = "int8",
    samples: Iterable[Any] | None = None,
    metric: Metric | None = None,
    adapters: Sequence[str | Path] = (),
    draws: int = 8,
    largest_rel_error: float | None = None,
    largest_ratio: float = 1.0,
    residual: AdaptedModel | None = None,
) -> QuantizationReport:
    """Write a smaller copy of ``source`` to ``path`` by onnxruntime's own quantizers, and measure what that changes.

    A file with run-time adapters keeps its inputs for them, in float: adapters for the source go into the copy too.

    Without ``samples``, the two files are compared on random values in the ranges that the export recorded. Such
    values are often harder than real ones, and the largest error is that of the worst entry of the worst one: for what
    the loss means for a task, give some real inputs.

    Args:
        source: a file that ``export_onnx`` wrote.
        path: the file to write.
        kind: ``"int8"``, weights in int8 and activations quantized as they come; ``"int8-static"``, both in int8 with
            Q/DQ nodes and ranges calibrated on ``samples``; ``"int4"``, weights of products in blocks of 4 bits
            (``MatMulNBits``); ``"float16"``, with operators left in float32 that the measured errors ask for.
        samples: your own data, as for ``export_onnx``, by the names or the order of the file's inputs.
        metric: with ``samples``, a function ``metric(outputs, batch)``, as for ``export_onnx``.
        adapters: files of ``save_onnx_adapter`` with which the copy is compared too; ``"int8-static"`` is calibrated
            with each of them.
        draws: without ``samples``, the number of random inputs.
        largest_rel_error: the largest accepted difference, divided by the largest value of its output; by default 0.25,
            0.5 for int4, whose steps are eight times those of int8, and 0.01 for float16.
        largest_ratio: for a file with merged adapters, the largest accepted ‖quantization error‖ / ‖ΔW‖ of a weight,
            Frobenius norms. Above one, rounding moves the weight by more than training did.
        residual: the adapted model that ``source`` was exported from: weights above ``largest_ratio`` are quantized
            without their update, which is kept beside them in float as two factors.

    Raises:
        ConfigError: ``path`` is the source, an option cannot work, or a sample does not fit the file.
        CheckpointError: an adapter is missing, damaged, or lacks an input of the file.
        ExportError: the source is damaged, has no record of its inputs, or onnxruntime cannot quantize it.
        VerificationError: the quantized file does not load or differs too much, or rounding would swallow the update of
            a weight; no file is left.
    """
    source, path = Path(source), Path(path)
    _assert_options(source, path, kind, samples)
    check_file(source)
    limit = KINDS[kind] if largest_rel_error is None else largest_rel_error
    task = _open(source, kind, samples, metric, adapters, draws, limit)
    with written_beside(path) as draft, tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        kept, ranges, rounding, unknown = _write_certified(task, Path(folder), largest_ratio, residual)
        _finish(task, Path(folder) / "small.onnx", draft)
        check_file(draft)
        errors, reports = _compare(task, draft)
        _assert_close(task, errors)
        given = reports if task.given else []
        append_verification(draft, summarize_verification(source.name, errors, given))
    return QuantizationReport(
        path=path,
        kind=kind,
        bytes_before=_size(source),
        bytes_after=_size(path),
        errors=tuple(errors),
        samples=tuple(reports),
        kept=kept,
        ranges=ranges,
        rounding=tuple(rounding),
        unknown=tuple(unknown),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """What is quantized, and what it is measured on.

    Attributes:
        description: the metadata of the source.
        updates: ‖ΔW‖ of each merged weight, from the same.
        given: whether the samples are the user's.
        adapters: by what reports call them, the inputs of each adapter; of the base model none.
    """

    source: Path
    description: Mapping[str, Any]
    updates: Mapping[str, float]
    kind: str
    limit: float
    reference: onnxruntime.InferenceSession
    inputs: list[str]
    check: SampleCheck
    given: bool
    adapters: Mapping[str, Mapping[str, torch.Tensor]]


def _assert_options(source: Path, path: Path, kind: str, samples: Any) -> None:
    if path.exists() and path.samefile(source):
        raise ConfigError(f"path={path} is the source itself; give another place")
    if kind not in KINDS:
        raise ConfigError(f"quantize_onnx(kind={kind!r}): expected one of {', '.join(map(repr, KINDS))}")
    if kind == "int8-static" and samples is None:
        raise ConfigError(
            "quantize_onnx(kind='int8-static') has no samples, expected real inputs on which the ranges of activations "
            "are found; give samples=, or take kind='int8'"
        )


def _assert_floating(source: Path, description: Mapping[str, Any]) -> None:
    found = description.get("quantized")
    if found is not None:
        raise ExportError(
            f"{source.name} is quantized to {found['kind']} already, expected a file in float; give the one that it "
            "was made from"
        )


def _open(
    source: Path,
    kind: str,
    samples: Any,
    metric: Metric | None,
    adapters: Sequence[str | Path],
    draws: int,
    limit: float,
) -> _Task:
    header = InitializerFile(source).header
    description = read_metadata(header, source.name)
    _assert_floating(source, description)
    reference = open_session(source)
    ranges = read_input_ranges(source)
    example = make_example(ranges, reference)
    check = make_check(samples, metric, example)
    if check is None:
        check = make_check([feeds for _, feeds in draw_feeds(ranges, draws)], None, example)
    assert check is not None
    opened = {value.name for value in reference.get_overridable_initializers()}
    tensors: dict[str, Mapping[str, torch.Tensor]] = {"base model" if opened else "": {}}
    for file in adapters:
        found = read_adapter_file(file).tensors
        if odd := sorted(found.keys() - opened):
            raise ConfigError(
                f"quantize_onnx(adapters=...): {file} has {odd[0]}, which is no input of {source.name}; expected an "
                "adapter for this file"
            )
        tensors[f"adapter {Path(file).name}"] = found
    if kind == "int8-static" and opened and not adapters:
        raise ConfigError(
            f"quantize_onnx(kind='int8-static'): {source.name} takes adapters, and the ranges of activations depend on "
            "them, but adapters= is empty; give the adapters that it is to serve, or take another kind"
        )
    return _Task(
        source=source,
        description=description,
        updates=read_updates(header, description, source.name),
        kind=kind,
        limit=limit,
        reference=reference,
        inputs=list(example.names),
        check=check,
        given=samples is not None,
        adapters=tensors,
    )


def _write_certified(
    task: _Task, folder: Path, largest_ratio: float, residual: AdaptedModel | None
) -> tuple[tuple[str, ...], str, list[WeightRounding], list[str]]:
    """Quantize, and once more with updates in float beside the weights whose updates rounding would swallow.

    Returns:
        What stays in float32, how ranges were found, the rounding of weights, and weights whose rounding is unknown.
    """
    updates, weights = task.updates, task.description["weights"]
    small = folder / "small.onnx"
    prepared = prepare(task.source, folder)
    kept, ranges = _write(task, prepared, small)
    rounding, unknown = measure_rounding(prepared, small, updates, weights)
    lost = {one.weight for one in find_swallowed(rounding, largest_ratio)}
    if lost and residual is not None:
        write_residual(task.source, folder / "residual.onnx", residual, sorted(lost), weights)
        prepared = prepare(folder / "residual.onnx", folder)
        kept, ranges = _write(task, prepared, small)
        measured, unknown = measure_rounding(prepared, small, updates, weights)
        rounding = [dataclasses.replace(one, is_residual=one.weight in lost) for one in measured]
    assert_not_swallowed(rounding, task.kind, largest_ratio)
    if not updates and task.description["adapters"] == "merged":  # written by an earlier version
        unknown = sorted(task.description.get("ranks", {}))
    return kept, ranges, rounding, unknown


def _write(task: _Task, prepared: Prepared, target: Path) -> tuple[tuple[str, ...], str]:
    """Run onnxruntime's quantizer; what stays in float32, and how ranges were found."""
    try:
        # It logs advice on the root logger that has been followed by then.
        with quiet_loggers("", level=logging.ERROR):
            if task.kind == "float16":
                batches = _read_batches(task, _SEARCH_BATCHES)
                return write_float16(prepared, target, batches, lambda file: _measure(task, file), task.limit), ""
            if task.kind == "int8-static":
                return (), _write_calibrated(task, prepared, target)
            (write_4bit if task.kind == "int4" else write_dynamic)(prepared, target)
            return (), ""
    except (OSError, ExportError):
        raise
    except Exception as error:  # onnxruntime raises types of its own and plain RuntimeErrors
        message = " ".join(str(error).split())
        raise ExportError(f"onnxruntime cannot quantize {task.source.name} to {task.kind}: {message}") from error


def _write_calibrated(task: _Task, prepared: Prepared, target: Path) -> str:
    """The better one of two methods, by the mean error on a few batches.

    Percentiles need batches of one shape, so they are those of the most frequent shape alone.
    """
    batches = _read_batches(task, CALIBRATION_BATCHES)
    chosen = {"MinMax": batches, "Percentile": find_equal(batches)}
    given = {
        method: [{**batch, **tensors} for tensors in task.adapters.values() for batch in some]
        for method, some in chosen.items()
    }
    if len(find_equal(given["Percentile"])) < len(given["Percentile"]):
        del given["Percentile"]  # adapters of several ranks
    errors = {}
    for method, feeds in given.items():
        write_static(prepared, target, feeds, method)
        errors[method] = _measure(task, target, statistics.mean)
    best = min(errors, key=lambda method: errors[method])
    if best != method:
        write_static(prepared, target, given[best], best)
    some = f" of {len(chosen[best])} of {len(batches)} batches" if len(chosen[best]) < len(batches) else ""
    return best + some


def _measure(task: _Task, file: Path, summarize: Any = max) -> float:
    """The largest relative error over a few batches and all outputs; inf for a file that does not load."""
    try:
        session = open_session(file)
    except VerificationError:
        return math.inf
    found = []
    for tensors in task.adapters.values():
        run, reference = (run_file(one, task.inputs, tensors) for one in (session, task.reference))
        for sample in itertools.islice(task.check.samples, _SEARCH_BATCHES):
            expected, given = reference(sample.call), run(sample.call)
            found += [measure_values("", name, given[name], want).max_rel for name, want in expected.items()]
    return float(summarize(found))


def _read_batches(task: _Task, most: int) -> list[dict[str, torch.Tensor]]:
    samples = itertools.islice(task.check.samples, most)
    return [dict(zip(task.inputs, sample.call.tensors, strict=True)) for sample in samples]


def _finish(task: _Task, small: Path, draft: Path) -> None:
    """Write the file to its place, with the source's description and a note on what was done."""
    model = onnx.load(small)
    set_metadata(model, {**task.description, "quantized": {"kind": task.kind, "largest_rel_error": task.limit}})
    save_model(model, draft)
    found = {value.name: value for value in open_session(draft).get_overridable_initializers()}
    for value in task.reference.get_overridable_initializers():
        if value.name not in found or found[value.name].type != value.type:
            raise ExportError(
                f"onnxruntime's quantizer has changed the input {value.name} of {task.source.name}, expected a "
                f"{value.type} that callers may give; export with adapters='merged' instead"
            )


def _compare(task: _Task, draft: Path) -> tuple[list[OutputError], list[SampleReport]]:
    session = open_session(draft)
    errors: list[OutputError] = []

    def measure(case: str, name: str, found: torch.Tensor, want: torch.Tensor) -> OutputError:
        case = case if task.given else case.removesuffix(" of the samples").replace("batch", "random values")
        error = measure_values(case, name, found, want)
        errors.append(error)
        return error

    reports = [
        task.check.compare(
            run_file(session, task.inputs, tensors),
            run_file(task.reference, task.inputs, tensors),
            subject=subject,
            source=task.source.name,
            compare=measure,
        )
        for subject, tensors in task.adapters.items()
    ]
    return errors, reports if task.given else []


def _assert_close(task: _Task, errors: Sequence[OutputError]) -> None:
    worst = max(errors, key=lambda error: error.max_rel)
    if worst.max_rel <= task.limit:
        return
    usual = statistics.median(error.max_rel for error in errors)
    advice = "" if task.given else "compare on real inputs (quantize_onnx(..., samples=...)), "
    over = "the samples" if task.given else "random values in the example's ranges"
    raise VerificationError(
        f"in {task.kind}, output {worst.output} differs on {worst.case} by {worst.max_rel:.1%} of its largest value "
        f"(the median over {over} is {usual:.1%}), accepted is {task.limit:.1%}; no file was written; {advice}"
        "raise largest_rel_error, or keep floating-point weights"
    )


def _size(path: Path) -> int:
    beside = InitializerFile(path).external_files()
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)

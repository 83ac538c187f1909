"""Weights in int8, by onnxruntime's dynamic quantizer, and the measured loss of accuracy."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx.verification.compare_files import (
    Feeds,
    check_file,
    draw_feeds,
    find_least_agreement,
    measure_values,
    read_input_ranges,
    run_named,
)
from adapter_compiler.onnx.verification.report import OutputError
from adapter_compiler.onnx.verification.verify import open_session
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.primitives.files import written_beside
from passes.capture.quiet import quiet_loggers


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The result of quantizing a file.

    Attributes:
        path: the int8 file.
        bytes_before: the size of the file it was made from.
        bytes_after: its size.
        errors: the differences of each output from the file it was made from, on each input.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    errors: tuple[OutputError, ...]

    @property
    def max_rel_error(self) -> float:
        """Largest difference relative to the largest value of its output."""
        return max((error.max_rel for error in self.errors), default=0.0)

    @property
    def median_rel_error(self) -> float:
        """The median of the same over outputs and inputs: what is usual, where the largest may be an exception."""
        return statistics.median([error.max_rel for error in self.errors] or [0.0])

    @property
    def argmax_agreement(self) -> float | None:
        """The smallest share of rows whose largest entry is the same one; ``None`` if no output has rows."""
        return find_least_agreement(self.errors)


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    *,
    draws: int = 8,
    examples: Sequence[Mapping[str, Any]] | None = None,
    largest_rel_error: float = 0.25,
) -> QuantizationReport:
    """Write ``source`` with int8 weights to ``path`` and measure what that changes.

    Without ``examples``, the two files are compared on random values in the ranges that the export recorded. Such
    values are often harder than real ones, and the largest error is that of the worst entry of the worst one: for what
    the loss means for a task, give some real inputs.

    Args:
        source: a file of the merged or the base model that ``export_onnx`` wrote.
        path: the file to write.
        draws: the number of random inputs.
        examples: inputs to compare on instead, each as tensors or arrays by name.
        largest_rel_error: the largest accepted difference, divided by the largest value of its output.

    Raises:
        ConfigError: ``path`` is the source, the source has inputs for adapters, or an example lacks an input or has
            another one.
        ExportError: the source is damaged, has no record of its inputs, or onnxruntime cannot quantize it.
        VerificationError: the quantized file does not load or differs too much; no file is left.
    """
    source, path = Path(source), Path(path)
    if path.exists() and path.samefile(source):
        raise ConfigError(f"path={path} is the source itself; give another place")
    check_file(source)
    reference = open_session(source)
    if opened := [value.name for value in reference.get_overridable_initializers()]:
        raise ConfigError(
            f"{source.name} has inputs for adapters ({opened[0]}), expected a file without; quantize an export with "
            "adapters='merged' instead"
        )
    if examples is None:
        feeds, kind = draw_feeds(read_input_ranges(source), draws), "random values in the example's ranges"
    else:
        feeds, kind = _name_examples(source, reference, examples), "the given examples"
    with written_beside(path) as draft:
        _quantize(source, draft)
        session = open_session(draft)
        errors = []
        for case, values in feeds:
            expected, found = run_named(reference, values, case), run_named(session, values, case)
            errors += [measure_values(case, name, found[name], want) for name, want in expected.items()]
        _assert_close(errors, kind, largest_rel_error)
    return QuantizationReport(path=path, bytes_before=_size(source), bytes_after=_size(path), errors=tuple(errors))


def _assert_close(errors: Sequence[OutputError], kind: str, largest_rel_error: float) -> None:
    worst = max(errors, key=lambda error: error.max_rel)
    if worst.max_rel <= largest_rel_error:
        return
    usual = statistics.median(error.max_rel for error in errors)
    advice = "" if kind == "the given examples" else "compare on real inputs (quantize_onnx(..., examples=...)), "
    raise VerificationError(
        f"in int8, output {worst.output} differs on {worst.case} by {worst.max_rel:.1%} of its largest value (the "
        f"median over {kind} is {usual:.1%}), accepted is {largest_rel_error:.1%}; no int8 file was written; {advice}"
        "raise largest_rel_error, or keep floating-point weights"
    )


def _name_examples(
    source: Path, session: onnxruntime.InferenceSession, examples: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Feeds]]:
    wanted = {value.name for value in session.get_inputs()}
    for number, example in enumerate(examples, 1):
        if odd := sorted(wanted ^ example.keys()):
            problem = "lacks the input" if odd[0] in wanted else "has the unknown input"
            raise ConfigError(
                f"quantize_onnx(examples=...): example {number} {problem} {odd[0]}, expected those of {source.name}: "
                f"{', '.join(sorted(wanted))}"
            )
    if not examples:
        raise ConfigError(
            "quantize_onnx(examples=...) is empty, expected at least one input; leave it out or give some"
        )
    return [
        (f"example {number}", {name: torch.as_tensor(value) for name, value in example.items()})
        for number, example in enumerate(examples, 1)
    ]


def _quantize(source: Path, draft: Path) -> None:
    """The quantizer finds weights only where a product reads them directly, so transposes are folded first."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        # Short names: onnxruntime adds to them.
        plain, quantized = (Path(folder) / name for name in ("plain.onnx", "int8.onnx"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(plain)
        try:
            onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            # It logs advice on the root logger that has been followed by then.
            with quiet_loggers("", level=logging.ERROR):
                # Seven bits: with eight, processors without VNNI add pairs of products in 16 bits, which saturate.
                quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8, reduce_range=True)
        except OSError:
            raise
        except Exception as error:  # onnxruntime raises types of its own and plain RuntimeErrors
            message = " ".join(str(error).split())
            raise ExportError(f"onnxruntime cannot quantize {source.name}: {message}") from error
        quantized.replace(draft)


def _size(path: Path) -> int:
    beside = InitializerFile(path).external_files()
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)

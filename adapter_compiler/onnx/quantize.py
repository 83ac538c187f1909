"""Weights in int8, by onnxruntime's own dynamic quantizer, with what that costs in accuracy measured."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path

import onnxruntime

from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx.verification.compare_files import (
    check_file,
    draw_feeds,
    find_least_agreement,
    measure_values,
    read_input_ranges,
    run_named,
)
from adapter_compiler.onnx.verification.report import OutputError
from adapter_compiler.onnx.verification.verify import open_session
from adapter_compiler.saving.primitives.files import written_beside
from passes.capture.quiet import quiet_loggers


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What quantizing a file did.

    Attributes:
        path: the int8 file.
        bytes_before: size of the file it was made from.
        bytes_after: its size.
        errors: how far each output is from the file it was made from, on each random input.
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
    def argmax_agreement(self) -> float | None:
        """The smallest share of rows whose largest entry is the same one; ``None`` if no output has rows."""
        return find_least_agreement(self.errors)


def quantize_onnx(
    source: str | Path, path: str | Path, *, draws: int = 8, largest_rel_error: float = 0.25
) -> QuantizationReport:
    """Write ``source`` with int8 weights to ``path`` and measure what that changes.

    Args:
        source: a file of the merged or the base model that ``export_onnx`` wrote.
        path: the file to write.
        draws: random inputs, in the ranges that the export recorded.
        largest_rel_error: beyond this, the file is refused.

    Raises:
        ExportError: the source is damaged, has no record of its inputs, or is beyond onnxruntime's quantizer.
        VerificationError: the quantized file does not load, or departs too far; no file is left.
    """
    source, path = Path(source), Path(path)
    if path.exists() and path.samefile(source):
        raise ConfigError(f"path={path} is the source itself; give another place")
    check_file(source)
    feeds = draw_feeds(read_input_ranges(source), draws)
    reference = open_session(source)
    with written_beside(path) as draft:
        _quantize(source, draft)
        session = open_session(draft)
        errors = []
        for case, values in feeds:
            expected, found = run_named(reference, values, case), run_named(session, values, case)
            errors += [measure_values(case, name, found[name], want) for name, want in expected.items()]
        worst = max(errors, key=lambda error: error.max_rel)
        if not worst.max_rel <= largest_rel_error:
            raise VerificationError(
                f"output {worst.output} on {worst.case} departs by {worst.max_rel:.1%} of its largest value in int8, "
                f"accepted is {largest_rel_error:.1%}; raise largest_rel_error or keep floating-point weights"
            )
    return QuantizationReport(path=path, bytes_before=_size(source), bytes_after=_size(path), errors=tuple(errors))


def _quantize(source: Path, draft: Path) -> None:
    """The quantizer takes weights only where a product reads them directly, so transposes are folded first."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        plain = Path(folder) / source.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(plain)
        try:
            onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            # It logs advice on the root logger that has been followed by then.
            with quiet_loggers("", level=logging.ERROR):
                # Seven bits: with eight, processors without VNNI add pairs of products in 16 bits, which saturate.
                quantize_dynamic(plain, draft, weight_type=QuantType.QInt8, reduce_range=True)
        except OSError:
            raise
        except Exception as error:  # onnxruntime raises types of its own and plain RuntimeErrors
            message = " ".join(str(error).split())
            raise ExportError(f"onnxruntime cannot quantize {source.name}: {message}") from error


def _size(path: Path) -> int:
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)

"""The report of a quantized file: size, errors, what stayed in float, and what rounding does to the update."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter_compiler.onnx.quantization.certify import WeightRounding, describe_rounding
from adapter_compiler.onnx.verification.report import OutputError, SampleReport, find_least_agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The result of quantizing a file.

    Attributes:
        path: the file.
        kind: ``"int8"``, ``"int8-static"``, ``"int4"`` or ``"float16"``.
        bytes_before: the size of the file it was made from.
        bytes_after: its size.
        errors: the differences of each output from the file it was made from, on each input.
        samples: how it does on the samples that were given, beside the file that it was made from; with adapters, once
            for each.
        kept: for float16, the nodes and kinds of operators that stay in float32.
        rounding: for a merged file, what rounding does to the update of each weight.
        ranges: for ``"int8-static"``, how the ranges of activations were found.
        unknown: the weights with an update whose rounding cannot be measured, because the exporter has folded them into
            something else, or because an earlier version has written the file, without the norms of the updates.
    """

    path: Path
    kind: str = "int8"
    bytes_before: int
    bytes_after: int
    errors: tuple[OutputError, ...]
    samples: tuple[SampleReport, ...] = ()
    kept: tuple[str, ...] = ()
    ranges: str = ""
    rounding: tuple[WeightRounding, ...] = ()
    unknown: tuple[str, ...] = ()

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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.bytes_after,
            "bytes_before": self.bytes_before,
            "max_rel_error": self.max_rel_error,
            "median_rel_error": self.median_rel_error,
            "argmax_agreement": self.argmax_agreement,
            "samples": [dataclasses.asdict(one) for one in self.samples],
            "kept": list(self.kept),
            "ranges": self.ranges,
            "rounding": [{**dataclasses.asdict(one), "ratio": one.ratio} for one in self.rounding],
            "unknown": list(self.unknown),
        }

    def describe(self) -> Iterator[str]:
        """The report in a few lines."""
        agreement = self.argmax_agreement
        shown = "" if agreement is None else f", argmax agrees on {agreement:.1%}"
        where = "" if self.samples else "on random values "
        yield f"wrote {self.path}: {self.kind}, {self.bytes_after:,} bytes of {self.bytes_before:,}"
        yield (
            f"{where}outputs differ by up to {self.max_rel_error:.1%} of their largest value, usually by "
            f"{self.median_rel_error:.1%}{shown}"
        )
        for report in self.samples:
            yield from report.describe()
        yield from describe_rounding(self.rounding)
        if self.unknown:
            yield f"rounding not measured for {len(self.unknown)} weights with an update: {', '.join(self.unknown)}"
        if self.kept:
            yield f"in float32, because float16 is not exact enough for them: {', '.join(self.kept)}"

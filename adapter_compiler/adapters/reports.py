"""The reports of quantizing and of folding: how far weights are from their exact values; and reports in notebooks."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping


def as_html(text: str) -> str:
    """Text as HTML, with its line breaks and columns; whatever it holds is shown, not interpreted."""
    return f"<pre style='line-height:1.2'>{html.escape(text)}</pre>"


class ShownInNotebooks:
    """What ``str()`` gives is what a notebook shows."""

    def _repr_html_(self) -> str:
        return as_html(str(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightError:
    """How far the unpacked weight W' is from the original W.

    Attributes:
        largest: max |W' - W|.
        relative: ‖W' - W‖_F / ‖W‖_F.
    """

    largest: float
    relative: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport(ShownInNotebooks):
    """Which weights were quantized, with what error, and the memory that it saved.

    Attributes:
        kind: the quantized format, ``"nf4"`` or ``"int8"``.
        errors: the quantization error of each quantized weight, by name.
        skipped: why each other adapted weight stays in full precision, by name.
        bytes_before: memory of the model's parameters and buffers before quantizing, in bytes.
        bytes_after: the same after quantizing.
    """

    kind: str
    errors: Mapping[str, WeightError]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        saved = f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after"
        rows = (f"{error.largest:12.1e} {error.relative:10.2%}  {name}" for name, error in self.errors.items())
        skipped = (f"not quantized: {name}: {reason}" for name, reason in self.skipped.items())
        head = f"{len(self.errors)} weights in {self.kind}: {saved}"
        return "\n".join([head, f"{'largest':>12} {'relative':>10}  error of", *rows, *skipped])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldReport(ShownInNotebooks):
    """The rounding error of each folded weight.

    Attributes:
        rounding_error: by site, the largest difference between W + ΔW in the weight's dtype and in float64.
        quantization_error: for each weight that was quantized, how far the unpacked W in the sum is from the original.
    """

    rounding_error: Mapping[str, float]
    quantization_error: Mapping[str, WeightError] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest rounding error over all sites."""
        return max(self.rounding_error.values(), default=0.0)

    def __str__(self) -> str:
        rows = (f"{error:12.1e}  {name}" for name, error in self.rounding_error.items())
        packed = (f"{e.largest:12.1e}  quantization of {name}" for name, e in self.quantization_error.items())
        head = f"{len(self.rounding_error)} weights folded, largest rounding error {self.largest:.1e}"
        return "\n".join([head, *rows, *packed])

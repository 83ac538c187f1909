"""The reports of quantizing and of folding: how far weights are from their exact values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


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
class QuantizationReport:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldReport:
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

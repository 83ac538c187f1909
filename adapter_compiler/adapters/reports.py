"""What quantizing and folding found."""

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
    """What was packed.

    Attributes:
        kind: the code, ``"nf4"`` or ``"int8"``.
        errors: by weight, what packing changed.
        skipped: why each other adapted weight stays in full precision.
        bytes_before: memory of the model's parameters and buffers before.
        bytes_after: the same afterwards.
    """

    kind: str
    errors: Mapping[str, WeightError]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldReport:
    """How exactly each ΔW went into its weight.

    Attributes:
        rounding_error: by site, the largest |W + ΔW as stored - W + ΔW in float64|.
        quantization_error: by weight that was quantized, how far the W that went into the sum is from the original.
    """

    rounding_error: Mapping[str, float]
    quantization_error: Mapping[str, WeightError] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest rounding error over all sites."""
        return max(self.rounding_error.values(), default=0.0)

"""What a report shows, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteData:
    """One adapted weight.

    Attributes:
        name: its qualified name.
        block: the block that it is in, as in ``encoder.layers.3``; empty outside of blocks.
        role: what it is for, as in ``attention.query``.
        shape: its shape.
        before: its rank at the start.
        after: its rank now.
        singular_values: those of ΔW, in descending order; empty if they were not computed.
        scores: the scores of its live triplets.
        pruned_scores: the scores of its pruned triplets that are still in memory.
    """

    name: str
    block: str
    role: str
    shape: tuple[int, ...]
    before: int
    after: int
    singular_values: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    pruned_scores: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingData:
    """One masking: the step, the budget, the live triplets, and the rank of each site."""

    step: int
    budget: int
    live: int
    ranks: Mapping[str, int]
    loss: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """A run.

    Attributes:
        title: the heading.
        sites: all adapted weights, in model order.
        maskings: the history of the budget, the oldest first; empty for a run without a budget.
        step: the number of optimizer steps so far.
        total_steps: how many there will be; 0 if that is not known.
        metric: the name of the score of triplets; empty without a budget.
        unit: what the budget counts, ``"triplets"`` or ``"parameters"``.
        parameters: the number of values in live triplets.
        is_frozen: whether the set of live triplets is fixed.
        losses: the loss of each step, or nothing.
        notes: further sentences, such as why something is not shown.
    """

    title: str
    sites: Sequence[SiteData]
    maskings: Sequence[MaskingData] = ()
    step: int = 0
    total_steps: int = 0
    metric: str = ""
    unit: str = "triplets"
    parameters: int = 0
    is_frozen: bool = False
    losses: Sequence[float] = ()
    notes: Sequence[str] = ()


class CurvePoint(Protocol):
    """A size of an adapter and its score."""

    @property
    def values(self) -> float:
        """The number of values."""

    @property
    def score(self) -> float:
        """The score, larger for better."""

    @property
    def error(self) -> float | None:
        """The standard error of the score."""


class SizeCurve(Protocol):
    """The result of ``find_smallest``."""

    @property
    def points(self) -> Sequence[CurvePoint]:
        """The sizes, the smallest first."""

    @property
    def target(self) -> float:
        """The least score that is enough."""

    @property
    def recommended(self) -> CurvePoint:
        """The smallest size that is enough."""


class Rounding(Protocol):
    """The result of ``fold``: ``adapted.fold_report``."""

    @property
    def rounding_error(self) -> Mapping[str, float]:
        """The largest difference between W + ΔW in the weight's dtype and in float64, by site."""


class OutputDifference(Protocol):
    """How far one output of an exported file is from PyTorch's."""

    @property
    def case(self) -> str:
        """The input."""

    @property
    def output(self) -> str:
        """The output's name."""

    @property
    def max_abs(self) -> float:
        """The largest absolute difference."""

    @property
    def max_rel(self) -> float:
        """The same over the largest absolute value."""


class Exported(Protocol):
    """The result of ``export_onnx``."""

    @property
    def errors(self) -> Sequence[OutputDifference]:
        """One entry for each output of each input."""


class Alignment(Protocol):
    """A ``Realigner``."""

    @property
    def threshold(self) -> float:
        """Below this, weights were re-aligned."""

    @property
    def history(self) -> Sequence[tuple[int, Mapping[str, float]]]:
        """The step and the alignment of each weight, the oldest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """What a report shows beside the run, if it is given."""

    curve: SizeCurve | None = None
    alignment: Alignment | None = None
    fold: Rounding | None = None
    export: Exported | None = None

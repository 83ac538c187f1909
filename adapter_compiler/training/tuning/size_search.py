"""The result of a search for the smallest adapter that is enough."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What the user's ``evaluate`` said of one adapter: one number, or one for each example.

    Attributes:
        values: the number, or the numbers; larger is better.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The score."""
        return statistics.fmean(self.values)


def read_score(value: Any) -> Score:
    """Check what ``evaluate`` returned.

    Raises:
        ConfigError: it is neither a finite number nor a vector of them.
    """
    found = torch.as_tensor(value, dtype=torch.float64) if _is_numeric(value) else torch.empty(0)
    if found.dim() > 1 or not found.numel() or not bool(found.isfinite().all()):
        raise ConfigError(
            f"evaluate returned {_describe(value)}, expected a finite number that is larger for a better model, or a "
            "vector with one number for each example"
        )
    return Score(values=tuple(found.reshape(-1).tolist()))


def find_error(runs: Sequence[Score], others: Sequence[Score] | None = None) -> float | None:
    """The standard error of the mean score, or of the mean difference to others run by run.

    It is that over runs if there are several, else that over examples, else ``None``.
    """
    if others is not None:
        runs = [_subtract(run, other) for run, other in zip(runs, others, strict=True)]
    values = [run.mean for run in runs] if len(runs) > 1 else list(runs[0].values)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizePoint:
    """An adapter of one size.

    Attributes:
        values: the number of values of the adapter, on average over runs.
        triplets: the sum of its ranks.
        score: the mean score.
        error: the standard error of the score: over runs if there are several, else over examples; ``None`` if
            ``evaluate`` returns one number.
        share: the share of the full gain, (score − base) / (full − base).
        share_error: the standard error of the share; runs and examples are paired with those of the full score.
    """

    values: float
    triplets: int
    score: float
    error: float | None
    share: float
    share_error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeSearch(ShownInNotebooks):
    """The result of :func:`~adapter_compiler.find_smallest`.

    Attributes:
        points: the sizes that were tried, the smallest first; the last is the wide adapter, which was not cut.
        base: the score before training.
        full: the score that counts as the whole gain.
        target: the least score that is enough.
        recommended: the smallest size that is enough.
        adapted: the model of the first run; its active adapter has the recommended size.
        spectrum: the singular values of the wide adapter's ΔW by site, in the first run.
        runs: the number of runs.
    """

    points: tuple[SizePoint, ...]
    base: float
    full: float
    target: float
    recommended: SizePoint
    adapted: AdaptedModel
    spectrum: Mapping[str, torch.Tensor]
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "base": self.base,
            "full": self.full,
            "target": self.target,
            "runs": self.runs,
            "recommended": dataclasses.asdict(self.recommended),
            "points": [dataclasses.asdict(point) for point in self.points],
            "ranks": {adapter.site.name: adapter.rank for adapter in self.adapted.plan},
            "spectrum": {site: values.tolist() for site, values in self.spectrum.items()},
        }

    def __str__(self) -> str:
        head = f"before training {self.base:.4g}, full {self.full:.4g}, enough {self.target:.4g}; {self.runs} run(s)"
        rows = [f"{'values':>12} {'triplets':>8}  {'score':<18} share of the full gain", *map(self._show, self.points)]
        return "\n".join([head, *rows])

    def _show(self, point: SizePoint) -> str:
        score, share = show_error(point.score, point.error), show_error(point.share, point.share_error)
        mark = "  recommended" if point == self.recommended else ""
        return f"{point.values:>12,.0f} {point.triplets:>8}  {score:<18} {share}{mark}"


def show_error(value: float, error: float | None) -> str:
    """A number with its standard error, if it has one."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _subtract(run: Score, other: Score) -> Score:
    if len(run.values) != len(other.values):
        raise ConfigError(
            f"evaluate returned {len(run.values)} numbers for one adapter and {len(other.values)} for another, "
            "expected one for each of the same examples; evaluate all adapters on the same examples"
        )
    return Score(values=tuple(a - b for a, b in zip(run.values, other.values, strict=True)))


def _is_numeric(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_complex()
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, (int, float)) for one in value)
    return isinstance(value, (int, float)) or hasattr(value, "__array__")


def _describe(value: Any) -> str:
    shape = tuple(value.shape) if hasattr(value, "shape") else None
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {shape}") + f" ({value!r})"[:60]

"""The table of a task: scores at the best rate, and differences to LoRA, run by run, with errors by pretraining."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.quality.methods import REFERENCE
from benchmarks.quality.results import TUNING, Result, score_by_rate, select
from benchmarks.quality.tasks.base import ACCURACY

_Runs = Mapping[tuple[int, int], Result]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table.

    Attributes:
        gain: how much better than the reference: in points, or in % of the reference's loss; ``None`` for itself.
        gain_error: its standard error; draws of one pretraining are one observation.
        is_inside: whether the best rate has a worse one on each side.
    """

    method: str
    rate: float
    parameters: float
    mean: float
    error: float | None
    gain: float | None
    gain_error: float | None
    worst: float
    runs: int
    seeds: int
    is_inside: bool


def summarize(results: Sequence[Result]) -> list[Row]:
    """A row for each method of one task that has been reported, the best first."""
    reported: dict[str, _Runs] = {}
    for name in dict.fromkeys(result["method"] for result in results):
        own = [result for result in select(results, method=name) if result["seed"] < TUNING]
        if own:
            reported[name] = {(result["seed"], result["draw"]): result for result in own}
    rows = [_make_row(results, name, runs, reported.get(REFERENCE, {})) for name, runs in reported.items()]
    sign = -1 if rows and _is_accuracy(results) else 1
    return sorted(rows, key=lambda row: sign * row.mean)


def _is_accuracy(results: Sequence[Result]) -> bool:
    return bool(results[0]["measure"] == ACCURACY)


def _make_row(results: Sequence[Result], name: str, runs: _Runs, reference: _Runs) -> Row:
    more = _is_accuracy(results)
    scores = {key: run["test"] for key, run in runs.items()}
    gains = {}
    for key in scores.keys() & reference.keys() if name != REFERENCE else ():
        other = reference[key]["test"]
        gains[key] = scores[key] - other if more else 100 * (other - scores[key]) / other
    tried = score_by_rate(select(results, method=name))
    rate = next(iter(runs.values()))["rate"]
    return Row(
        method=name,
        rate=rate,
        parameters=statistics.fmean(run["parameters"] for run in runs.values()),
        mean=statistics.fmean(scores.values()),
        error=find_error(scores),
        gain=statistics.fmean(gains.values()) if gains else None,
        gain_error=find_error(gains) if gains else None,
        worst=(min if more else max)(scores.values()),
        runs=len(scores),
        seeds=len({seed for seed, _ in scores}),
        is_inside=not tried or (min(tried) < rate < max(tried)),
    )


def find_error(values: Mapping[tuple[int, int], float]) -> float | None:
    """The standard error of the mean over pretrainings; the draws of one are averaged first."""
    clusters: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        clusters.setdefault(seed, []).append(value)
    means = [statistics.fmean(cluster) for cluster in clusters.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def write_table(results: Sequence[Result]) -> list[str]:
    """The lines of a Markdown table."""
    rows = summarize(results)
    measure = results[0]["measure"] if results else ACCURACY
    unit = "points" if measure == ACCURACY else "%"
    heads = ("method", "rate", "values", measure, f"better than `{REFERENCE}`, {unit}", "worst", "runs")
    lines = [heads, ("---",) * len(heads), *(_to_cells(row) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _to_cells(row: Row) -> tuple[str, ...]:
    gain = "" if row.gain is None else _with_error(f"{row.gain:+.1f}", row.gain_error, 1)
    digits = 1 if row.mean > 20 else 3
    mean = _with_error(f"{row.mean:.{digits}f}", row.error, digits)
    rate = f"{row.rate:.2g}" + ("" if row.is_inside else " (edge)")
    runs = f"{row.runs} of {row.seeds}"
    return row.method, rate, f"{row.parameters:,.0f}", mean, gain, f"{row.worst:.{digits}f}", runs


def _with_error(value: str, error: float | None, digits: int) -> str:
    return value if error is None else f"{value} ± {error:.{digits}f}"

"""The table of a task: scores at the best rate, and differences to LoRA, run by run, with errors by pretraining."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.quality.methods import PEERS, REFERENCE
from benchmarks.quality.results import TUNING, Result, score_by_rate, select
from benchmarks.quality.tasks.base import ACCURACY

_Runs = Mapping[tuple[int, int], Result]

#: What is compared with the best peer: the recommended method.
OURS = "muon_budget"


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
    names = dict.fromkeys(result["method"] for result in results)
    reported = {name: own for name in names if (own := find_reported(results, name))}
    rows = [_make_row(results, name, runs, reported.get(REFERENCE, {})) for name, runs in reported.items()]
    sign = -1 if rows and _is_accuracy(results) else 1
    return sorted(rows, key=lambda row: sign * row.mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our default beside the best peer of a task.

    Attributes:
        peer: the name of the peer whose mean is the best.
        ours: the mean of ``OURS``.
        theirs: the mean of the peer.
        gain: how much better ours is, run by run: in points, or in % of the peer's loss.
        gain_error: its standard error.
        full: the mean of full fine-tuning; ``None`` if it has not been run.
        runs: how many runs both have.
    """

    peer: str
    ours: float
    theirs: float
    gain: float
    gain_error: float | None
    full: float | None
    runs: int


def compare_with_peers(results: Sequence[Result]) -> Comparison | None:
    """The comparison on one task, or ``None`` where ours or every peer is missing."""
    rows = {row.method: row for row in summarize(results)}
    peers = [name for name in rows if name in PEERS]  # the best first
    if OURS not in rows or not peers:
        return None
    ours, theirs = find_reported(results, OURS), find_reported(results, peers[0])
    gains = find_gains(ours, theirs, more=_is_accuracy(results))
    return Comparison(
        peer=peers[0],
        ours=rows[OURS].mean,
        theirs=rows[peers[0]].mean,
        gain=statistics.fmean(gains.values()),
        gain_error=find_error(gains),
        full=rows["full"].mean if "full" in rows else None,
        runs=len(gains),
    )


def _is_accuracy(results: Sequence[Result]) -> bool:
    return bool(results[0]["measure"] == ACCURACY)


def _make_row(results: Sequence[Result], name: str, runs: _Runs, reference: _Runs) -> Row:
    more = _is_accuracy(results)
    scores = {key: run["test"] for key, run in runs.items()}
    gains = find_gains(runs, reference, more=more) if name != REFERENCE else {}
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


def find_reported(results: Sequence[Result], method: str) -> _Runs:
    """The runs of one method that are reported, by seed and draw."""
    own = [result for result in select(results, method=method) if result["seed"] < TUNING]
    return {(result["seed"], result["draw"]): result for result in own}


def find_gains(runs: _Runs, reference: _Runs, *, more: bool) -> dict[tuple[int, int], float]:
    """How much better each run is than the same run of another method: in points, or in % of the other's loss."""
    gains = {}
    for key in sorted(runs.keys() & reference.keys()):
        score, other = runs[key]["test"], reference[key]["test"]
        gains[key] = score - other if more else 100 * (other - score) / other
    return gains


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


def write_summary(by_task: Mapping[str, Sequence[Result]]) -> list[str]:
    """The lines of a Markdown table: the recommended method beside the best peer of each task."""
    heads = ("task", "best peer", "peer", OURS, "better by", "full", "runs")
    lines = [heads, ("---",) * len(heads)]
    for task, results in by_task.items():
        found = compare_with_peers(results)
        if found is None:
            continue
        unit = "points" if _is_accuracy(results) else "%"
        theirs, ours, full = map(_round, (found.theirs, found.ours, found.full))
        gain = f"{_with_error(f'{found.gain:+.1f}', found.gain_error, 1)} {unit}"
        lines.append((task, found.peer, theirs, ours, gain, full, str(found.runs)))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _round(value: float | None) -> str:
    return "" if value is None else f"{value:.{_count_digits(value)}f}"


def _count_digits(value: float) -> int:
    return 1 if value > 20 else 3


def _to_cells(row: Row) -> tuple[str, ...]:
    gain = "" if row.gain is None else _with_error(f"{row.gain:+.1f}", row.gain_error, 1)
    digits = _count_digits(row.mean)
    mean = _with_error(f"{row.mean:.{digits}f}", row.error, digits)
    rate = f"{row.rate:.2g}" + ("" if row.is_inside else " (edge)")
    runs = f"{row.runs} of {row.seeds}"
    return row.method, rate, f"{row.parameters:,.0f}", mean, gain, f"{row.worst:.{digits}f}", runs


def _with_error(value: str, error: float | None, digits: int) -> str:
    return value if error is None else f"{value} ± {error:.{digits}f}"

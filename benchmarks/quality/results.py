"""Results as JSON lines, one a run, and which runs are missing.

tune     seeds from 1000 on, which are never reported; every rate
report   seeds from 0 on, several draws of examples each; the best rate
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.tasks.base import ACCURACY

Result = dict[str, Any]

#: Seeds from here on are for tuning.
TUNING = 1000
#: Neighboring rates differ by this factor.
STEP = 1.6
#: Further rates on each side at most.
_MOST_MORE = 6


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Wanted:
    """One run: the pretraining, the draw of examples, and the rate."""

    seed: int
    draw: int
    rate: float


def read_results(path: Path) -> list[Result]:
    """What has been run; a last line that was cut off is left out."""
    return list(_read_lines(path)) if path.is_file() else []


def _read_lines(path: Path) -> Iterator[Result]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_results(path: Path, results: Sequence[Result]) -> None:
    """Append lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)


def select(results: Sequence[Result], **wanted: Any) -> list[Result]:
    """The results with these values."""
    return [result for result in results if all(result[name] == value for name, value in wanted.items())]


def score_by_rate(results: Sequence[Result]) -> dict[float, float]:
    """The mean score of one method on the tuning seeds by rate, larger for better; on all held-out examples."""
    found: dict[float, list[float]] = {}
    for result in results:
        if result["seed"] >= TUNING:
            sign = 1 if result["measure"] == ACCURACY else -1
            found.setdefault(result["rate"], []).append(sign * (result["validation"] + result["test"]) / 2)
    return {rate: statistics.fmean(scores) for rate, scores in sorted(found.items())}


def find_best_rate(results: Sequence[Result]) -> float | None:
    """The best rate of one method on the tuning seeds, if it has a worse one on each side or the search has ended."""
    scores = score_by_rate(results)
    return None if find_next_rate(scores) is not None or not scores else max(scores, key=scores.__getitem__)


def find_next_rate(scores: dict[float, float]) -> float | None:
    """The next rate to try, beyond the best one if that is at the edge; ``None`` if it is inside."""
    if not scores or len(scores) > 2 + 2 * _MOST_MORE:
        return None
    rates, best = sorted(scores), max(scores, key=scores.__getitem__)
    return rates[0] / STEP if best == rates[0] else rates[-1] * STEP if best == rates[-1] else None


def find_missing(results: Sequence[Result], method: str, *, tuning: int, seeds: int, draws: int) -> list[Wanted]:
    """The runs of one method that come next: all at once, until nothing is missing.

    Args:
        results: the results of one task.
        method: the method's name.
        tuning: how many seeds rates are tried on.
        seeds: how many seeds are reported.
        draws: how many draws of examples of each.
    """
    own = select(results, method=METHODS[method].repeats or method)
    scores = score_by_rate(own)
    rate = find_best_rate(own)
    if METHODS[method].repeats is None:
        guess = METHODS[method].guess
        rates = [*scores] or [guess / STEP, guess, guess * STEP]
        further = find_next_rate(scores)
        tried = _find_absent(own, [Wanted(seed=TUNING + s, draw=0, rate=r) for r in rates for s in range(tuning)])
        if not tried and further is not None:
            tried = [Wanted(seed=TUNING + s, draw=0, rate=further) for s in range(tuning)]
        if tried:
            return tried
    if rate is None:
        return []
    wanted = [Wanted(seed=seed, draw=draw, rate=rate) for seed in range(seeds) for draw in range(draws)]
    return _find_absent(select(results, method=method), wanted)


def _find_absent(results: Sequence[Result], wanted: Sequence[Wanted]) -> list[Wanted]:
    done = {(result["seed"], result["draw"], result["rate"]) for result in results}
    return [one for one in wanted if (one.seed, one.draw, one.rate) not in done]

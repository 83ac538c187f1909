"""Accuracy of every method at equal final size, each at its own best learning rate, over seeds.

    python -m benchmarks.quality --out quality.jsonl                                  digits, in minutes
    python -m benchmarks.quality --out quality.jsonl --task banking77 --data DIR --model ENCODER
    python -m benchmarks.quality --out quality.jsonl --task med --seeds 0 --markdown   the table of what is there

Results are appended as JSON lines, one a run; a run that is in the file is not repeated, so the benchmark can be
stopped and continued, and two of them can share a file (each with methods of its own). Every learning rate is tried
on the first seeds; the one that is best on their validation splits is then run on all seeds. The table gives mean
and standard error on the test split and the paired difference to LoRA on the same seeds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality_methods import METHODS, get_rates, run_method
from benchmarks.quality_tasks import TEXT_TASKS, Task, get_steps, make_digits, make_text

console = Console()
#: What the others are compared with, seed by seed.
_REFERENCE = "lora"
_KEY = ("task", "method", "rank", "rate", "steps", "seed")

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table, in points; no difference for the reference itself, no error on one seed."""

    method: str
    rate: float
    parameters: float
    mean: float
    error: float | None
    difference: float | None
    difference_error: float | None
    seeds: int


def main(
    out: Annotated[Path, typer.Option(help="The JSON lines; what is there already is not repeated.")],
    task: Annotated[str, typer.Option(help=f"digits, {', '.join(TEXT_TASKS)}")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder with the text data sets, each in its own.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a sentence encoder that transformers loads.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    rank: Annotated[int, typer.Option(help="Rank at the end, on average.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the task's own if not given.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    sweep: Annotated[int, typer.Option(help="Seeds on which every learning rate is tried.")] = 2,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Run what is missing, then print the table."""
    torch.set_num_threads(1)
    chosen = method or list(METHODS)
    if unknown := set(chosen) - METHODS.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(METHODS)}", param_hint="--method")
    steps = steps or get_steps(task)
    key = {"task": task, "rank": rank, "steps": steps}
    for seed in range(seeds):
        made: Task | None = None
        for name in chosen:
            rates = get_rates(task, METHODS[name])
            for rate in _missing_rates(_select(read_results(out), {**key, "method": name}), rates, seed, sweep):
                made = made or make_task(task, data, model, seed)
                result = _run(made, name, rank, rate, steps, seed)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                console.print(
                    f"seed {seed} {name:<22} rate {rate:<7g} test {result['test']:.3f}  {result['seconds']:.1f} s"
                )
    show(summarize(_select(read_results(out), key)), markdown)


def _select(results: list[Result], wanted: Result) -> list[Result]:
    return [result for result in results if all(result[name] == value for name, value in wanted.items())]


def _missing_rates(results: list[Result], rates: Sequence[float], seed: int, sweep: int) -> list[float]:
    """The learning rates that one method has to run on a seed."""
    done = {result["rate"] for result in results if result["seed"] == seed}
    wanted = rates if seed < sweep else (find_best_rate(results),)
    return [rate for rate in wanted if rate not in done]


def find_best_rate(results: list[Result]) -> float:
    """The learning rate of one method that is best on the validation splits of the seeds that every rate was run on."""
    runs: dict[float, dict[int, float]] = {}
    for result in results:
        runs.setdefault(result["rate"], {})[result["seed"]] = result["validation"]
    shared = set.intersection(*(set(scores) for scores in runs.values()))
    return max(
        runs,
        key=lambda rate: statistics.mean(score for seed, score in runs[rate].items() if seed in shared or not shared),
    )


def make_task(name: str, data: Path | None, model: Path | None, seed: int) -> Task:
    """The task of this name, pretrained."""
    if name == "digits":
        return make_digits(seed)
    if name not in TEXT_TASKS:
        raise typer.BadParameter(f"{name}; there are digits, {', '.join(TEXT_TASKS)}", param_hint="--task")
    if data is None or model is None:
        raise typer.BadParameter(f"{name} needs --data and --model", param_hint="--task")
    return make_text(name, data, model, seed)


def _run(task: Task, name: str, rank: int, rate: float, steps: int, seed: int) -> Result:
    start = time.perf_counter()
    outcome = run_method(METHODS[name], task, rank=rank, rate=rate, steps=steps, seed=seed)
    key = dict(zip(_KEY, (task.name, name, rank, rate, steps, seed), strict=True))
    return {**key, **dataclasses.asdict(outcome), "seconds": round(time.perf_counter() - start, 2)}


def read_results(path: Path) -> list[Result]:
    """What has been run; a last line that was cut off is left out."""
    return list(_read_lines(path)) if path.is_file() else []


def _read_lines(path: Path) -> Iterator[Result]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def summarize(results: list[Result]) -> list[Row]:
    """A row a method, at the learning rate that was best on the validation split."""
    best = {}
    for name in dict.fromkeys(result["method"] for result in results):
        own = _select(results, {"method": name})
        rate = find_best_rate(own)
        best[name] = {result["seed"]: result for result in own if result["rate"] == rate}
    return [_make_row(name, runs, best.get(_REFERENCE, {})) for name, runs in best.items()]


def _make_row(name: str, runs: dict[int, Result], reference: dict[int, Result]) -> Row:
    scores = [100 * run["test"] for run in runs.values()]
    paired = [100 * (run["test"] - reference[seed]["test"]) for seed, run in runs.items() if seed in reference]
    is_compared = bool(paired) and name != _REFERENCE
    return Row(
        method=name,
        rate=next(iter(runs.values()))["rate"],
        parameters=statistics.mean(run["parameters"] for run in runs.values()),
        mean=statistics.mean(scores),
        error=_standard_error(scores),
        difference=statistics.mean(paired) if is_compared else None,
        difference_error=_standard_error(paired) if is_compared else None,
        seeds=len(scores),
    )


def _standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def show(rows: list[Row], markdown: bool = False) -> None:
    """Print the table, the best method first."""
    heads = ("method", "rate", "values", "accuracy", f"difference to {_REFERENCE}", "seeds")
    lines = [_to_cells(row) for row in sorted(rows, key=lambda row: -row.mean)]
    if markdown:
        for line in (heads, ("---",) * len(heads), *lines):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(*heads)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _to_cells(row: Row) -> tuple[str, ...]:
    mean = _with_error(f"{row.mean:.1f}", row.error)
    difference = "" if row.difference is None else _with_error(f"{row.difference:+.1f}", row.difference_error)
    return row.method, f"{row.rate:g}", f"{row.parameters:,.0f}", mean, difference, str(row.seeds)


def _with_error(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ± {error:.1f}"


if __name__ == "__main__":
    typer.run(main)

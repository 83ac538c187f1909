"""How good every method is at equal final size, each at its own best learning rate, with honest errors.

    python -m benchmarks.quality --out quality.jsonl                        digits, all methods
    python -m benchmarks.quality --out quality.jsonl --task characters --method lora --method muon
    python -m benchmarks.quality --out quality.jsonl --task med --data DIR --model ENCODER
    python -m benchmarks.quality --out quality.jsonl --table                the table of what is there, as Markdown
    python -m benchmarks.quality --out quality.jsonl --summary              all tasks, against the best peer of each

Rates are a factor of 1.6 apart and are tried on seeds that are not reported, until the best one has a worse one on each
side. That rate is then run on fresh seeds: each is a pretraining, with several draws of examples. Results are appended
as JSON lines, one a run; a run that is in the file is not repeated, so the benchmark can be stopped and continued.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality.building import build_run
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Result, Wanted, append_results, find_missing, read_results, select
from benchmarks.quality.table import write_summary, write_table
from benchmarks.quality.tasks import SMALL_TASKS, TEXT_TASKS, get_steps, make_task
from benchmarks.quality.tasks.base import Task, draw_batches, measure
from benchmarks.quality.training import train


def main(
    out: Annotated[Path, typer.Option(help="The JSON lines; what is there already is not repeated.")],
    task: Annotated[str, typer.Option(help=f"{', '.join([*SMALL_TASKS, *TEXT_TASKS])}")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder with the text data sets, each in its own.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a sentence encoder that transformers loads.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    rank: Annotated[int, typer.Option(help="Rank at the end, on average.")] = 2,
    tuning: Annotated[int, typer.Option(help="Seeds that rates are tried on.")] = 2,
    seeds: Annotated[int, typer.Option(help="Seeds that are reported.")] = 8,
    draws: Annotated[int, typer.Option(help="Draws of examples for each seed.")] = 2,
    table: Annotated[bool, typer.Option(help="Print the table and run nothing.")] = False,
    summary: Annotated[bool, typer.Option(help="Print all tasks against their best peers and run nothing.")] = False,
) -> None:
    """Run what is missing, then print the table."""
    torch.set_num_threads(1)
    if summary:
        every = read_results(out)
        by_task = {name: select(every, **_find_key(name, rank)) for name in [*SMALL_TASKS, *TEXT_TASKS]}
        print("\n".join(write_summary({name: found for name, found in by_task.items() if found})))
        return
    chosen = method or list(METHODS)
    if unknown := set(chosen) - METHODS.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(METHODS)}", param_hint="--method")
    key = _find_key(task, rank)
    made: dict[tuple[int, int], Task] = {}
    for name in () if table else chosen:
        while wanted := find_missing(
            select(read_results(out), **key), name, tuning=tuning, seeds=seeds, draws=draws
        ):  # fmt: skip
            for one in wanted:
                if (one.seed, one.draw) not in made:
                    made[one.seed, one.draw] = make_task(task, one.seed, one.draw, data=data, encoder=model)
            part = wanted[: made[wanted[0].seed, wanted[0].draw].at_once]
            results = run_together(name, [made[one.seed, one.draw] for one in part], part, rank, get_steps(task))
            append_results(out, results)
            for result in results:
                print(*(f"{k} {v}" for k, v in result.items() if k not in ("task", "steps", "measure")), flush=True)
    print("\n".join(write_table(select(read_results(out), **key))))


def _find_key(task: str, rank: int) -> dict[str, Any]:
    """The entries by which the results of a task are found."""
    return {"task": task, "rank": rank, "steps": get_steps(task)}


def run_together(name: str, tasks: list[Task], wanted: list[Wanted], rank: int, steps: int) -> list[Result]:
    """Train several runs of one method at once."""
    start = time.process_time()
    method = METHODS[name]
    shift = 0 if method.repeats is None else 500_000
    numbers = [shift + 1000 * one.seed + one.draw for one in wanted]
    batches = [draw_batches(t.train, steps, t.batch_size, n) for t, n in zip(tasks, numbers, strict=True)]
    runs = [
        build_run(method, task, own, rank=rank, rate=one.rate, seed=number)
        for task, own, one, number in zip(tasks, batches, wanted, numbers, strict=True)
    ]
    train(tasks[0], runs, batches)
    seconds = round((time.process_time() - start) / len(runs), 2)
    return [
        {
            "task": task.name,
            "method": name,
            "rank": rank,
            "steps": steps,
            "rate": one.rate,
            "seed": one.seed,
            "draw": one.draw,
            "measure": task.measure,
            "validation": measure(task, run.model, task.validation),
            "test": measure(task, run.model, task.test),
            "parameters": run.count(),
            "seconds": seconds,
        }
        for task, run, one in zip(tasks, runs, wanted, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)

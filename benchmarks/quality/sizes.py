"""How small an adapter may be: find_rate, find_smallest and d90 on a task, beside uniform ranks that take their time.

    python -m benchmarks.quality.sizes --out sizes.jsonl --task digits_coarse --seeds 3
    python -m benchmarks.quality.sizes --out sizes.jsonl --task med --data DIR --model ENCODER
    python -m benchmarks.quality.sizes --out sizes.jsonl --task med --table       the table of what is there
    python -m benchmarks.quality.sizes --out sizes.jsonl --picture sizes.svg      all tasks that are there, drawn

For each pretraining: the rate of the wide adapter by ``find_rate``; full fine-tuning, whose gain over no training is
the whole; the smallest adapters that keep shares of it by ``find_smallest``; adapters of uniform ranks, each trained
from the start, of which the smallest that is enough is taken; and d90, the intrinsic dimension. A score is the accuracy
on test examples, or minus the loss, and the search is judged by the same: it compares sizes, it does not report a
model. Prints a Markdown table, in which the steps of each way are counted. A pretraining that is in the file is not
repeated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import adapter_compiler as ac
from benchmarks.quality.building import HEAD_RATE, SCALE, make_adamw
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import append_results, read_results, select
from benchmarks.quality.sizes_picture import draw_sizes
from benchmarks.quality.tasks import SMALL_TASKS, TEXT_TASKS, get_steps, make_task
from benchmarks.quality.tasks.base import ACCURACY, Task, draw_batches, measure
from benchmarks.quality.training import find_share

#: The peak rate of full fine-tuning and of training in subspaces, whose coordinates move all weights at once.
_FULL_RATE, _SUBSPACE_RATE = 2.5e-3, 2.5e-2
#: The same for the sentence encoder, which is larger.
_TEXT_RATES = (1e-4, 1e-2)
_SHARES = (0.95, 0.99)
_UNIFORM = (1, 2, 3, 4, 6)

_Row = dict[str, Any]


def main(
    out: Annotated[Path, typer.Option(help="The JSON lines; what is there already is not repeated.")],
    task: Annotated[str, typer.Option(help=f"{', '.join([*SMALL_TASKS, *TEXT_TASKS])}")] = "digits_coarse",
    data: Annotated[Path | None, typer.Option(help="Folder with the text data sets, each in its own.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a sentence encoder that transformers loads.")] = None,
    seeds: Annotated[int, typer.Option(help="Pretrainings.")] = 3,
    wide: Annotated[int, typer.Option(help="Rank of the wide adapter.")] = 8,
    dimension: Annotated[bool, typer.Option(help="Also measure d90.")] = True,
    table: Annotated[bool, typer.Option(help="Print the table and run nothing.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw what is there and run nothing.")] = None,
) -> None:
    """Run what is missing, then print a table."""
    torch.set_num_threads(1)
    if picture is not None:
        draw_sizes(read_results(out), picture)
        return
    for seed in range(0 if table else seeds):
        if not select(read_results(out), task=task, seed=seed):
            made = make_task(task, seed, 0, data=data, encoder=model)
            row = measure_sizes(made, get_steps(task), wide, seed, has_dimension=dimension)
            append_results(out, [{"task": task, "seed": seed, **row}])
    print("\n".join(write_lines(select(read_results(out), task=task))))


def measure_sizes(task: Task, steps: int, wide: int, seed: int, *, has_dimension: bool) -> _Row:
    """All numbers of one pretraining; ``points`` are pairs of a number of values and a score."""
    batches = draw_batches(task.train, steps, task.batch_size, seed)
    trainer = _Trainer(task, batches, steps)
    base, full = trainer.score(task.model), trainer.train_full()
    rate = find_wide_rate(task, batches, wide)
    row: _Row = {"base": base, "full": full, "rate": rate}
    points: dict[str, dict[float, float]] = {"searched": {}, "uniform": {}, "subspace": {}}
    for share in _SHARES:
        size, tried = trainer.search(wide, rate, full, share)
        points["searched"] |= tried
        row |= {f"searched {share}": size, f"searched {share} steps": trainer.take_steps()}
    points["uniform"] = dict(trainer.train_uniform(rank, rate) for rank in (*_UNIFORM, wide))
    row |= {"uniform steps": trainer.take_steps()}
    for share in _SHARES:
        enough = [size for size, score in points["uniform"].items() if score >= base + share * (full - base)]
        row[f"uniform {share}"] = min(enough, default=math.nan)
    if has_dimension:
        found = ac.measure_intrinsic_dimension(
            task.copy_model(), trainer.train_subspace, trainer.score, weights=task.sites
        )
        row |= {"d90": found.dimension, "d90 of": found.weights, "d90 steps": trainer.take_steps()}
        points["subspace"] = {point.dimension: point.score for point in found.points}
    return {**row, "points": {name: sorted(tried.items()) for name, tried in points.items()}}


def find_wide_rate(task: Task, batches: Sequence[Any], wide: int) -> float:
    """The rate of the wide adapter, by trials on half of the steps that are judged on validation examples."""
    adapted = _adapt(task, wide)
    found = ac.find_rate(
        adapted,
        _make_optimizer(task, adapted, 2.5e-3 if task.head is None else 4e-4),
        lambda model, batch: task.loss(model(**batch[0]), batch[1]),
        batches[: len(batches) // 2],
        validation=[task.validation],
    )
    return found.best


class _Trainer:
    """Trains in each of the ways, and counts steps."""

    def __init__(self, task: Task, batches: Sequence[Any], steps: int) -> None:
        self._task, self._batches, self._steps = task, batches, steps
        self._taken = 0
        self._full_rate, self._subspace_rate = (_FULL_RATE, _SUBSPACE_RATE) if task.head is None else _TEXT_RATES

    def take_steps(self) -> int:
        """The steps since this was asked before."""
        taken, self._taken = self._taken, 0
        return taken

    def score(self, model: nn.Module) -> float:
        """The accuracy, or minus the loss."""
        value = measure(self._task, model, self._task.test)
        return value if self._task.measure == ACCURACY else -value

    def train_full(self) -> float:
        model = self._task.copy_model()
        self._train_by_adamw(model, self._full_rate)
        self.take_steps()
        return self.score(model)

    def train_uniform(self, rank: int, rate: float) -> tuple[int, float]:
        """The number of values, and the score."""
        adapted = _adapt(self._task, rank)
        self._train(adapted, _make_optimizer(self._task, adapted, rate), 1.0)
        return sum(p.numel() for p in adapted.adapters.parameters()), self.score(adapted)

    def search(self, wide: int, rate: float, full: float, share: float) -> tuple[float, dict[float, float]]:
        """The number of values of the smallest adapter, nan if even the wide one is not enough; all that were tried."""
        try:
            found = ac.find_smallest(
                lambda: _adapt(self._task, wide),
                lambda adapted, part: self._train(adapted, _make_optimizer(self._task, adapted, rate), part),
                self.score,
                share_of_full=share,
                full=full,
            )
        except ac.AdapterCompilerError as error:
            if "expected at least" not in str(error):
                raise
            return math.nan, {}
        return found.recommended.values, {point.values: point.score for point in found.points}

    def train_subspace(self, model: nn.Module) -> None:
        """For the full score at the rate of full fine-tuning, and for the coordinates of a subspace at theirs."""
        count = sum(p.requires_grad for p in model.parameters())
        self._train_by_adamw(model, self._subspace_rate if count == 1 else self._full_rate)

    def _train_by_adamw(self, model: nn.Module, rate: float) -> None:
        self._train(model, make_adamw(METHODS["full"], self._task, model.named_parameters(), rate), 1.0)

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, part: float) -> None:
        steps = max(2, round(part * self._steps))
        peaks = [group["lr"] for group in optimizer.param_groups]
        model.train()
        for step, (inputs, labels) in enumerate(self._batches[:steps]):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * find_share(step, steps)
            optimizer.zero_grad()
            self._task.loss(model(**inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self._taken += steps


def _adapt(task: Task, rank: int) -> ac.AdaptedModel:
    head = () if task.head is None else (f"{task.head}.*",)
    config = ac.AdapterConfig(
        rank=rank, alpha=SCALE * rank, sites=task.sites, trainable=head, kind="lora", init="orthogonal"
    )  # fmt: skip
    example = {name: value[:4] for name, value in task.train[0].items()}
    return ac.compile_with_adapters(task.copy_model(), example_kwargs=example, config=config)


def _make_optimizer(task: Task, adapted: ac.AdaptedModel, rate: float) -> torch.optim.Optimizer:
    return adapted.make_optimizer(rate, other_lr=rate if task.head is None else HEAD_RATE)


def write_lines(rows: Sequence[_Row]) -> list[str]:
    """A Markdown table of means over pretrainings, with the least and the largest."""
    shown = ("steps", "points", "task", "seed")
    names = [name for name in rows[0] if not name.endswith(shown)]
    lines = ["| | mean | least to largest | steps |", "| --- | --- | --- | --- |"]
    for name in names:
        values = [row[name] for row in rows]
        group = "uniform steps" if name.startswith("uniform") else f"{name} steps"
        steps = [row[group] for row in rows if group in row]
        show: Callable[[float], str] = (lambda v: f"{v:.2g}") if name == "rate" else _show
        spread = f"{show(min(values))} to {show(max(values))}"
        count = f"{statistics.fmean(steps):,.0f}" if steps else ""
        lines.append(f"| {name} | {show(statistics.fmean(values))} | {spread} | {count} |")
    return lines


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.3f}"


if __name__ == "__main__":
    typer.run(main)

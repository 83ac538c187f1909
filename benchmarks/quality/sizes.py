"""How small an adapter may be: find_rate, find_smallest and d90 on a task, beside uniform ranks that take their time.

    python -m benchmarks.quality.sizes --task digits_coarse --seeds 3

For each pretraining: the rate of the wide adapter by ``find_rate``; full fine-tuning, whose gain over no training is
the whole; the smallest adapters that keep shares of it by ``find_smallest``; adapters of uniform ranks, each trained
from the start, of which the smallest that is enough is taken; and d90, the intrinsic dimension. A share is of the
accuracy on test images, which are also those that the search is judged by: it compares sizes, it does not report a
model. Prints a Markdown table, in which the steps of each way are counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import nn

import adapter_compiler as ac
from benchmarks.quality.building import SCALE
from benchmarks.quality.tasks import SMALL_TASKS, get_steps, make_task
from benchmarks.quality.tasks.base import ACCURACY, Task, draw_batches, measure
from benchmarks.quality.training import find_share

#: The peak rate of full fine-tuning and of training in subspaces, whose coordinates move all weights at once.
_FULL_RATE, _SUBSPACE_RATE = 2.5e-3, 2.5e-2
_BETAS = (0.8, 0.9)

_Row = dict[str, float]


def main(
    task: Annotated[str, typer.Option(help=f"{', '.join(SMALL_TASKS)}")] = "digits_coarse",
    seeds: Annotated[int, typer.Option(help="Pretrainings.")] = 3,
    wide: Annotated[int, typer.Option(help="Rank of the wide adapter.")] = 8,
    dimension: Annotated[bool, typer.Option(help="Also measure d90.")] = True,
) -> None:
    """Run everything and print a table."""
    torch.set_num_threads(1)
    rows: list[_Row] = []
    for seed in range(seeds):
        rows.append(measure_sizes(make_task(task, seed, 0), get_steps(task), wide, seed, has_dimension=dimension))
        print({name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    print("\n".join(write_lines(rows)))


def measure_sizes(task: Task, steps: int, wide: int, seed: int, *, has_dimension: bool) -> _Row:
    """All numbers of one pretraining."""
    batches = draw_batches(task.train, steps, task.batch_size, seed)
    trainer = _Trainer(task, batches, steps)
    base, full = trainer.score(task.model), trainer.train_full()
    rate = find_wide_rate(task, batches, wide)
    row: _Row = {"base": base, "full": full, "rate": rate}
    for share in (0.95, 0.99):
        row |= {f"searched {share}": trainer.search(wide, rate, full, share)}
        row |= {f"searched {share} steps": trainer.take_steps()}
    uniform = {rank: trainer.train_uniform(rank, rate) for rank in (1, 2, 3, 4, 6, wide)}
    row |= {"uniform steps": trainer.take_steps()}
    for share in (0.95, 0.99):
        enough = [size for size, score in uniform.values() if score >= base + share * (full - base)]
        row[f"uniform {share}"] = min(enough, default=float("nan"))
    if has_dimension:
        found = ac.measure_intrinsic_dimension(
            task.copy_model(), trainer.train_subspace, trainer.score, weights=task.sites
        )
        row |= {"d90": found.dimension, "d90 of": found.weights, "d90 steps": trainer.take_steps()}
    return row


def find_wide_rate(task: Task, batches: Sequence[Any], wide: int) -> float:
    """The rate of the wide adapter, by trials on half of the steps that are judged on validation images."""
    adapted = _adapt(task, wide)
    found = ac.find_rate(
        adapted,
        adapted.make_optimizer(2.5e-3),
        lambda model, batch: task.loss(model(**batch[0]), batch[1]),
        batches[: len(batches) // 2],
        validation=[task.validation],
    )
    return found.best


class _Trainer:
    """Trains in each of the ways, and counts steps."""

    def __init__(self, task: Task, batches: Sequence[Any], steps: int) -> None:
        if task.measure != ACCURACY:
            raise typer.BadParameter(f"{task.name} is measured by {task.measure}, expected a task with accuracies")
        self._task, self._batches, self._steps = task, batches, steps
        self._taken = 0

    def take_steps(self) -> int:
        """The steps since this was asked before."""
        taken, self._taken = self._taken, 0
        return taken

    def score(self, model: nn.Module) -> float:
        return measure(self._task, model, self._task.test)

    def train_full(self) -> float:
        model = self._task.copy_model()
        self._train(model, torch.optim.AdamW(model.parameters(), lr=_FULL_RATE, betas=_BETAS, weight_decay=0), 1.0)
        self.take_steps()
        return self.score(model)

    def train_uniform(self, rank: int, rate: float) -> tuple[int, float]:
        """The number of values, and the score."""
        adapted = _adapt(self._task, rank)
        self._train(adapted, adapted.make_optimizer(rate), 1.0)
        return sum(p.numel() for p in adapted.adapters.parameters()), self.score(adapted)

    def search(self, wide: int, rate: float, full: float, share: float) -> float:
        """The number of values of the smallest adapter, nan if even the wide one is not enough."""
        try:
            found = ac.find_smallest(
                lambda: _adapt(self._task, wide),
                lambda adapted, part: self._train(adapted, adapted.make_optimizer(rate), part),
                self.score,
                share_of_full=share,
                full=full,
            )
        except ac.AdapterCompilerError as error:
            if "expected at least" not in str(error):
                raise
            return float("nan")
        return found.recommended.values

    def train_subspace(self, model: nn.Module) -> None:
        """For the full score at the rate of full fine-tuning, and for the coordinates of a subspace at theirs."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        rate = _SUBSPACE_RATE if len(parameters) == 1 else _FULL_RATE
        self._train(model, torch.optim.AdamW(parameters, lr=rate, betas=_BETAS, weight_decay=0), 1.0)

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, part: float) -> None:
        steps = max(2, round(part * self._steps))
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step, (inputs, labels) in enumerate(self._batches[:steps]):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * find_share(step, steps)
            optimizer.zero_grad()
            self._task.loss(model(**inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self._taken += steps


def _adapt(task: Task, rank: int) -> ac.AdaptedModel:
    config = ac.AdapterConfig(rank=rank, alpha=SCALE * rank, sites=task.sites, kind="lora", init="orthogonal")
    return ac.compile_with_adapters(
        task.copy_model(), example_kwargs={k: v[:4] for k, v in task.train[0].items()}, config=config
    )


def write_lines(rows: Sequence[_Row]) -> list[str]:
    """A Markdown table of means over pretrainings, with the least and the largest."""
    names = [name for name in rows[0] if not name.endswith("steps")]
    lines = ["| | mean | least to largest | steps |", "| --- | --- | --- | --- |"]
    for name in names:
        values = [row[name] for row in rows]
        group = "uniform steps" if name.startswith("uniform") else f"{name} steps"
        steps = rows[0].get(group)
        show: Callable[[float], str] = (lambda v: f"{v:.2g}") if name == "rate" else (lambda v: f"{v:,.1f}")
        spread = f"{show(min(values))} to {show(max(values))}"
        lines.append(f"| {name} | {show(statistics.fmean(values))} | {spread} | {'' if steps is None else steps} |")
    return lines


if __name__ == "__main__":
    typer.run(main)

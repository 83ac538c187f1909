"""Two tasks with few examples, an adapter each: a start from both tasks' gradients together, and re-alignment.

    ./run python -m benchmarks.joint_start

A small vision transformer knows scikit-learn's handwritten digits; the tasks are those of ``benchmarks/mixtures.py``,
with 200 images each. Both have an adapter of their own, of the same rank, which trains on its task's batches alone.
Every start trains at each of a few learning rates; the rate is chosen on the training loss of its last steps, and
accuracies are those on held-out images. Differences are taken pretraining by pretraining.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import adapter_compiler as ac
from benchmarks.mixtures import BATCH, SITES, Tasks, find_loss, pretrain_on_digits, take_steps, write_lines

RATES = (5e-3, 1.2e-2, 3e-2)
SHOTS, LOOKS = 200, 2
TASKS = ("default", "second")
#: The row that others are compared with.
PLAIN = "default start"

_Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How both adapters start.

    Attributes:
        method: ``"joint"``, a method of ``initialize_adapters`` for each task by itself, or nothing for the default.
        every: steps between re-alignments; 0 for none.
        kind: of both adapters.
    """

    method: str = ""
    every: int = 0
    kind: str = "svd"


STARTS = {
    PLAIN: Start(),
    "gradient_svd, each task by itself": Start(method="gradient_svd"),
    "joint start": Start(method="joint"),
    "default start, realigned every 25 steps": Start(every=25),
    "joint start, realigned every 25 steps": Start(method="joint", every=25),
    "LoRA, default start": Start(kind="lora"),
    "LoRA, LoRA-GA, each task by itself": Start(kind="lora", method="lora_ga"),
    "LoRA, joint start": Start(kind="lora", method="joint"),
}


def draw(data: Tasks, task: int, count: int, seed: int) -> list[_Batch]:
    """Batches of the first images of a task."""
    images, labels = (part[:SHOTS] for part in data.parts[0][task])
    dice = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(images), (BATCH,), generator=dice) for _ in range(count)]
    return [(images[chosen], labels[chosen]) for chosen in rows]


def run(model: nn.Module, data: Tasks, seed: int, start: Start, lr: float, steps: int, rank: int) -> tuple[float, Any]:
    """The mean loss of the last steps, and the accuracies of both tasks."""
    torch.manual_seed(seed)
    config = ac.AdapterConfig(kind=start.kind, sites=SITES, rank=rank, alpha=4.0 * rank)
    adapted = ac.compile_with_adapters(model, config=config)
    adapted.add_adapter(TASKS[1])
    looks = {name: draw(data, number, LOOKS, 7) for number, name in enumerate(TASKS)}
    if start.method == "joint":
        ac.initialize_jointly(adapted, looks, find_loss)
    losses, accuracies = [], []
    for number, name in enumerate(TASKS):
        adapted.use(name)
        if start.method not in ("", "joint"):
            look = ac.DataStart(method=start.method, at_once=len(adapted.sites))
            ac.initialize_adapters(adapted, look, looks[name], find_loss)
        losses.append(train(adapted, draw(data, number, steps, 1), lr, looks[name], start.every))
        accuracies += data.accuracies(adapted, (number,))
        adapted.train()
    return statistics.mean(losses), accuracies


def train(adapted: ac.AdaptedModel, batches: list[_Batch], lr: float, looks: list[_Batch], every: int) -> float:
    """Train the active adapter; the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=lr, betas=(0.8, 0.9))
    if every:
        ac.Realigner(adapted, optimizer, realign_every=every, batches=looks, loss=find_loss)
    return take_steps(adapted, optimizer, batches, lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    rows: dict[str, list[Any]] = {name: [] for name in STARTS}
    chosen: dict[str, list[float]] = {name: [] for name in STARTS}
    for seed in range(options.seeds):
        data = Tasks(seed)
        model = pretrain_on_digits(data, seed)
        for name, start in STARTS.items():
            runs = {lr: run(model, data, seed, start, lr, options.steps, options.rank) for lr in options.rates}
            best = min(runs, key=lambda lr: runs[lr][0])
            rows[name].append(runs[best][1])
            chosen[name].append(best)
        print(seed, {name: found[-1] for name, found in rows.items()}, file=sys.stderr)
    print("\n".join(write_lines(rows, PLAIN)))
    print("\nrates that were chosen: " + _describe(chosen))


def _describe(chosen: Mapping[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{lr:g}' for lr in rates)}" for name, rates in chosen.items())


if __name__ == "__main__":
    main()

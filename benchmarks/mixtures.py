"""Two tasks that contradict each other in one model: a mixture of experts against one adapter and two, at equal size.

    ./run python -m benchmarks.mixtures

A small vision transformer knows scikit-learn's handwritten digits. One task wants the digits of images that are rotated
and inverted; the other, on images as they are, another name for each digit (y + 5 modulo 10). Which task an image is
from is not told, except to the two adapters of half the rank, which are switched. Every method trains on the same
batches, half from each task, at each of a few learning rates; the rate is chosen on the training loss of its last
steps, and accuracies are those on held-out images of both tasks. Differences to one LoRA are taken pretraining by
pretraining.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.cli.demo.data import LabeledImages, load_digits, rotate_and_invert
from benchmarks.quality.tasks.base import as_examples, cross_entropy, pretrain
from benchmarks.quality.tasks.digits import CoarseTransformer

SITES = ("blocks.*",)
RATES = (5e-3, 8e-3, 1.3e-2)
BATCH = 32

#: The row that others are compared with, and that of two adapters.
ONE = "one LoRA"
TWO = "two LoRAs of half the rank, switched"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained.

    Attributes:
        config: of the adapter.
        balance: the weight of the load-balancing loss; 0 for none.
        target: the mean rank that a budget leaves; 0 for no budget.
    """

    config: dict[str, Any]
    balance: float = 0.0
    target: float = 0.0


def find_methods(rank: int) -> dict[str, Method]:
    """The methods, by the name of their row."""
    mixtures = {
        "soft, per token": ac.Mixture(experts=2),
        "soft, per example": ac.Mixture(experts=2, per="example"),
        "top 1, per example": ac.Mixture(experts=2, per="example", top_k=1),
    }
    found = {ONE: Method(config={"kind": "lora", "rank": rank})}
    for name, mixture in mixtures.items():
        config = {"kind": "lora", "rank": rank, "mixture": mixture}
        found[f"mixture, {name}"] = Method(config=config)
        if mixture.top_k is not None:
            found[f"mixture, {name}, balanced"] = Method(config=config, balance=0.01)
    start, mixture = rank * 3 // 2, mixtures["soft, per example"]
    alpha = {"alpha": 16.0 * start / rank}
    found["one AdaLoRA, budget"] = Method(config={"rank": start, **alpha}, target=rank)
    found["svd mixture, soft, per example, no budget"] = Method(config={"rank": rank, "mixture": mixture})
    found["svd mixture, soft, per example, budget"] = Method(
        config={"rank": start, **alpha, "mixture": mixture}, target=rank
    )
    return found


class Tasks:
    """Batches of both tasks, and their held-out images."""

    def __init__(self, seed: int) -> None:
        self.upright, self.held_out = load_digits(seed)
        self.parts = [self._both(self.upright), self._both(self.held_out)]

    @staticmethod
    def _both(digits: LabeledImages) -> list[tuple[Tensor, Tensor]]:
        turned = rotate_and_invert(digits)
        return [(turned.images, turned.labels), (digits.images, (digits.labels + 5) % 10)]

    def draw(self, dice: torch.Generator, tasks: Sequence[int]) -> tuple[Tensor, Tensor]:
        drawn = []
        for task in tasks:
            images, labels = self.parts[0][task]
            chosen = torch.randint(len(images), (BATCH // len(tasks),), generator=dice)
            drawn.append((images[chosen], labels[chosen]))
        return torch.cat([one for one, _ in drawn]), torch.cat([two for _, two in drawn])

    @torch.no_grad()
    def accuracies(self, model: nn.Module, tasks: Sequence[int]) -> list[float]:
        model.eval()
        found = []
        for task in tasks:
            images, labels = self.parts[1][task]
            found.append(100 * float((model(images).argmax(-1) == labels).float().mean()))
        return found


def train(adapted: ac.AdaptedModel, method: Method, data: Tasks, tasks: Sequence[int], lr: float, steps: int) -> float:
    """Train the active adapter; the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=lr, betas=(0.8, 0.9))
    if method.balance:
        ac.RouterBalance(adapted, optimizer, weight=method.balance)
    if method.target:
        ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=method.target, total_steps=steps))
    dice = torch.Generator().manual_seed(1)
    return take_steps(adapted, optimizer, [data.draw(dice, tasks) for _ in range(steps)], lr)


def take_steps(
    adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]], lr: float
) -> float:
    """A step for each batch, at a rate that rises over ten steps and then falls; the mean loss of the last tenth."""
    losses, steps = [], len(batches)
    adapted.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = find_loss(adapted, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return statistics.mean(losses[-steps // 10 :])


def find_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross-entropy of images and labels."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def pretrain_on_digits(data: Tasks, seed: int) -> nn.Module:
    """The transformer after the digits as they are."""
    torch.manual_seed(seed)
    return pretrain(CoarseTransformer(), as_examples(data.upright), cross_entropy, steps=500, seed=seed)


def run(model: nn.Module, data: Tasks, seed: int, method: Method, lr: float, steps: int) -> tuple[float, list[float]]:
    torch.manual_seed(seed)
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(sites=SITES, **method.config))
    loss = train(adapted, method, data, (0, 1), lr, steps)
    return loss, data.accuracies(adapted, (0, 1))


def run_two(model: nn.Module, data: Tasks, seed: int, rank: int, lr: float, steps: int) -> tuple[float, list[float]]:
    """Two adapters of half the rank, each trained for half of the steps on batches of its own task."""
    found, losses = [], []
    for task in (0, 1):
        torch.manual_seed(seed)
        method = Method(config={"kind": "lora", "rank": rank // 2})
        adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(sites=SITES, **method.config))
        losses.append(train(adapted, method, data, (task,), lr, steps // 2))
        found += data.accuracies(adapted, (task,))
    return statistics.mean(losses), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--only", nargs="*", default=[""], help="words of the names of the methods to run")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rank, seeds, steps = options.rank, range(options.seeds), options.steps
    data = {seed: Tasks(seed) for seed in seeds}
    models = {seed: pretrain_on_digits(data[seed], seed) for seed in seeds}
    rows: dict[str, list[list[float]]] = {}
    for name, method in {**find_methods(rank), TWO: None}.items():
        if not any(words in name for words in options.only):
            continue
        rows[name] = []
        for seed in seeds:
            given = (models[seed], data[seed], seed)
            runs = [
                run_two(*given, rank, lr, steps) if method is None else run(*given, method, lr, steps)
                for lr in options.rates
            ]
            rows[name].append(min(runs, key=lambda one: one[0])[1])
        print(name, rows[name], file=sys.stderr)
    print("\n".join(write_lines(rows)))


def write_lines(rows: Mapping[str, Sequence[Sequence[float]]], reference: str = ONE) -> list[str]:
    """A Markdown table of mean accuracies of both tasks, and of paired differences to a reference."""
    lines = [
        f"| method | rotated and inverted | renamed | mean | better than {reference} |",
        "|---|---:|---:|---:|---:|",
    ]
    base = [statistics.mean(row) for row in rows.get(reference, ())]
    for name, found in rows.items():
        first, second = (statistics.mean(row[task] for row in found) for task in (0, 1))
        each = [statistics.mean(row) for row in found]
        gains = [own - other for own, other in zip(each, base, strict=False)] if name != reference else []
        gain = write_mean(gains, "+.1f") if gains else ""
        lines.append(f"| {name} | {first:.1f} | {second:.1f} | {write_mean(each, '.1f')} | {gain} |")
    return lines


def write_mean(values: Sequence[float], form: str) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {error:.1f}"


if __name__ == "__main__":
    main()

"""Whether ``sites="auto"`` learns better than ``"all-linear"`` with the same number of values, where few are linear.

    ./run python benchmarks/default_sites.py [--data DIR] [--seeds N]

Three models are trained on one form of their input, then adapted to another one from few examples, with a rank budget
of equally many values: a residual network of convolutions and an LSTM that read digits turned and inverted, and a
network with embeddings of categories on measures of tumors, whose columns are replaced by those of the worst cells.
With ``--data``, an LSTM on words also learns from the first half of the classes of banking77 and is adapted to the
others. Learning rates are chosen on validation examples, separately for each choice of sites; accuracies are of others.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

import adapter_compiler as ac

RATES, STEPS = (1e-2, 3e-2), 100
Examples = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Task:
    name: str
    build: Callable[[], nn.Module]
    source: Examples
    train: Examples
    validation: Examples
    test: Examples
    budget: int


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1)
        self.second = nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)
        self.norms = nn.ModuleList(nn.GroupNorm(4, out) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.skip(x))


class Convolutional(nn.Module):
    """Nine weights, of which one is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x.unsqueeze(1)))).mean((2, 3)))


class Recurrent(nn.Module):
    """Five weights, of which one is linear; the rows of an image are the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(8, 32, num_layers=2, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Tabular(nn.Module):
    """Five weights, of which two are linear; the first three columns are categories."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
        self.hidden, self.head = nn.Linear(columns - 3 + 24, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        embedded = [table(x[:, i].long()) for i, table in enumerate(self.tables)]
        return self.head(F.relu(self.hidden(torch.cat([*embedded, x[:, 3:]], 1))))


class Words(nn.Module):
    """Six weights, of which one is linear."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, 32, padding_idx=0)
        self.layers, self.head = nn.LSTM(32, 64, num_layers=2, batch_first=True), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.table(x))[0].amax(1))


def split(x: Tensor, y: Tensor, sizes: tuple[int, int, int], seed: int) -> list[Examples]:
    """Random parts of these sizes, and the rest."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    return [
        (x[part], y[part])
        for part in (order[: ends[0]], *(order[a:b] for a, b in itertools.pairwise(ends)), order[ends[2] :])
    ]


def digits(name: str, build: Callable[[], nn.Module], seed: int) -> Task:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    source, *parts = split(x, y, (900, 100, 200), seed)
    train, validation, test = ((1 - one.rot90(1, (1, 2)), labels) for one, labels in parts)
    return Task(name, build, source, train, validation, test, budget=400)


def tumors(seed: int) -> Task:
    data = load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    means, worst = x[:, :10], x[:, 20:]
    center, spread = means.mean(0), means.std(0)

    def prepare(columns: Tensor) -> Tensor:
        scaled = (columns - center) / spread
        return torch.cat([((scaled[:, :3] + 2) * 2).clamp(0, 9).floor(), scaled[:, 3:]], 1)

    source, *parts = split(torch.stack([prepare(means), prepare(worst)], 1), y, (250, 60, 60), seed)
    train, validation, test = ((one[:, 1], labels) for one, labels in parts)
    return Task(
        "tabular with embeddings", lambda: Tabular(10), (source[0][:, 0], source[1]), train, validation, test, 200
    )


def banking(folder: Path, seed: int) -> Task:
    rows: list[list[str]] = []
    for part in ("train", "test"):
        with (folder / "banking77" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows += list(csv.reader(file))[1:]
    names = sorted({name for _, name in rows})[:20]
    chosen = [(text.lower().split()[:16], names.index(name)) for text, name in rows if name in names]
    words = {word: i + 1 for i, word in enumerate(sorted({word for text, _ in chosen for word in text}))}
    x = torch.tensor([[words[word] for word in text] + [0] * (16 - len(text)) for text, _ in chosen])
    y = torch.tensor([label for _, label in chosen])
    first, later = y < 10, y >= 10
    parts = split(x[later], y[later] - 10, (200, 300, 300), seed)
    model = lambda: Words(len(words) + 1, 10)  # noqa: E731
    return Task("LSTM on words (banking77)", model, (x[first], y[first]), parts[0], parts[1], parts[3], 600)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples, steps: int) -> None:
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(examples[0]), (32,))
        F.cross_entropy(model(examples[0][rows]), examples[1][rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, examples: Examples) -> float:
    return 100 * float((model(examples[0]).argmax(1) == examples[1]).float().mean())


def adapt(task: Task, base: nn.Module, sites: str, rate: float, seed: int) -> tuple[ac.AdaptedModel, ac.RankBudget]:
    torch.manual_seed(seed)
    config = ac.AdapterConfig(rank=12, alpha=12, sites=sites)
    adapted = ac.compile_with_adapters(base, (task.train[0][:2],), config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=rate, weight_decay=0.0)
    schedule = ac.BudgetSchedule(target_parameters=task.budget, total_steps=STEPS, warmup_steps=10, final_steps=40)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    fit(adapted, optimizer, task.train, STEPS)
    return adapted, budget


def run(task: Task, seed: int) -> dict[str, tuple[float, int, int]]:
    """By choice of sites: accuracy on the test examples, number of adapted weights, values that are left."""
    torch.manual_seed(seed)
    base = task.build()
    fit(base, torch.optim.AdamW(base.parameters(), lr=3e-3), task.source, 300)
    found = {"no adapters": (measure(base, task.test), 0, 0)}
    for sites in ("all-linear", "auto"):
        tried = [adapt(task, base, sites, rate, seed) for rate in RATES]
        adapted, budget = max(tried, key=lambda one: measure(one[0], task.validation))
        found[sites] = (measure(adapted, task.test), len(adapted.sites), budget.live_parameters)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder that holds banking77/")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    logging.getLogger("adapter_compiler").setLevel(logging.ERROR)
    makers: list[Callable[[int], Task]] = [
        lambda seed: digits("residual convolutions", Convolutional, seed),
        lambda seed: digits("LSTM", Recurrent, seed),
        tumors,
    ]
    if options.data is not None:
        makers.append(lambda seed: banking(options.data, seed))
    print("| model | sites | weights | values | accuracy, mean ± standard error |\n|---|---|---|---|---|")
    for make in makers:
        results = [run(make(seed), seed) for seed in range(options.seeds)]
        for sites in results[0]:
            scores = [result[sites][0] for result in results]
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
            values = statistics.mean(result[sites][2] for result in results)
            accuracy = f"{statistics.mean(scores):.1f} ± {error:.1f}"
            print(f"| {make(0).name} | {sites} | {results[0][sites][1]} | {values:.0f} | {accuracy} |", flush=True)


if __name__ == "__main__":
    main()

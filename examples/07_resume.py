"""Stop a training with adapters and a rank budget at any step, and resume it bit for bit.

    python examples/07_resume.py

A network that reads scikit-learn's digits is adapted to rotated ones twice: once without a break, and once stopped in
the middle of the pruning, saved to a folder, and resumed by new objects that know nothing but that folder. Weights,
masks, moments of the optimizer and the order in which ranks were pruned must then be equal in every bit. The network
has dropout, so the state of the random generator is a part of what is saved, as is that of the scheduler.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, STOP = 120, 31


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    rows = torch.randint(len(x), (64,))
    F.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_base(x: Tensor, y: Tensor) -> nn.Module:
    """A trained network with dropout between its layers."""
    layers = [module for _ in range(3) for module in (nn.LazyLinear(64), nn.ReLU(), nn.Dropout(0.2))]
    base = nn.Sequential(*layers, nn.LazyLinear(10))
    base(x)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(200):
        train_step(base, optimizer, x, y)
    return base


class Run:
    """Everything that a training consists of, made anew from the same base model."""

    def __init__(self, base: nn.Module) -> None:
        config = ac.AdapterConfig(rank=8, alpha=8, trainable=("9.*",))
        self.adapted = ac.compile_with_adapters(base, config=config).train()
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=2e-2)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 2e-2, STEPS)
        schedule = ac.BudgetSchedule(target_rank=3, total_steps=STEPS, interval=5)
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule)

    def train(self, x: Tensor, y: Tensor, *, until: int) -> None:
        while self.budget.step < until:
            train_step(self.adapted, self.optimizer, x, y)
            self.rate.step()

    def save(self, folder: Path) -> None:
        ac.save_training_state(folder, self.adapted, self.optimizer, self.budget, rate=self.rate)

    def load(self, folder: Path) -> None:
        ac.load_training_state(folder, self.adapted, self.optimizer, self.budget, rate=self.rate)


def find_tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(state, Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in find_tensors(value, f"{path}/{key}").items()}


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    base, rotated = make_base(x, y), x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)

    torch.manual_seed(1)
    whole = Run(base)
    whole.train(rotated, y, until=STEPS)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        first = Run(base)
        first.train(rotated, y, until=STOP)
        first.save(Path(folder))
        torch.manual_seed(2)  # a new process would not have the old random state either
        resumed = Run(base)
        resumed.load(Path(folder))
    resumed.train(rotated, y, until=STEPS)

    table = Table("state", "tensors", "equal", title=f"{STEPS} steps, and the same stopped and resumed at {STOP}")
    for name in ("adapted", "optimizer", "budget"):
        expected, found = (find_tensors(getattr(run, name).state_dict()) for run in (whole, resumed))
        assert expected.keys() == found.keys()
        equal = sum(torch.equal(expected[key], found[key]) for key in expected)
        table.add_row(name, str(len(expected)), str(equal))
        assert equal == len(expected), f"{name} differs after the resume"
    Console().print(table)
    assert whole.budget.history == resumed.budget.history, "the ranks were pruned in another order"
    assert resumed.budget.live_triplets == 3 * len(resumed.adapted.sites) < first.budget.live_triplets
    with torch.no_grad():
        before, after = (
            (model(rotated).argmax(1) == y).float().mean() for model in (base.eval(), resumed.adapted.eval())
        )
    Console().print(f"triplets: {first.budget.live_triplets} at the stop, {resumed.budget.live_triplets} at the end")
    Console().print(f"accuracy on the rotated digits: {before:.1%} before, {after:.1%} after")
    assert after > before


if __name__ == "__main__":
    main()

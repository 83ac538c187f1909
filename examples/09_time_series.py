"""Adapt a recurrent forecaster to a series with another rhythm, with adapters on the weights of its LSTM.

    python examples/09_time_series.py

An LSTM reads a day of hourly demand and forecasts the next twelve hours. It has learned one customer, an office with a
peak at noon and quiet weekends; then it gets another one, a canteen with three meals. The series are made here, of a
daily and a weekly rhythm, a slow drift and noise. By default only weights of matrix products are adapted, which here
is the last layer; ``sites="auto"`` adapts the recurrent weights as well, and the budget shows which of them matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, PAST, FUTURE, WEEK = 120, 24, 12, 168


class Forecaster(nn.Module):
    """Forecasts the next hours from the last ones."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.head = nn.Linear(width, FUTURE)

    def forward(self, past: Tensor) -> Tensor:
        """The next hours [batch, 12] from the last ones [batch, 24]."""
        states, _ = self.lstm(past.unsqueeze(-1))
        return self.head(states[:, -1])


def make_series(weeks: int, *, peaks: tuple[int, ...], weekend: float) -> Tensor:
    """Hourly demand: the hours of its peaks, and the share of it that is left on weekends."""
    hours = torch.arange(weeks * WEEK)
    sharp = sum(torch.exp(len(peaks) ** 2 * (torch.cos(2 * torch.pi * (hours - peak) / 24) - 1)) for peak in peaks)
    share = torch.where(hours % WEEK >= 5 * 24, weekend, 1.0)
    drift = 0.2 * torch.sin(2 * torch.pi * hours / (weeks * WEEK))
    return 2 * sharp * share - 0.5 + drift + 0.05 * torch.randn(len(hours))


def cut(series: Tensor) -> tuple[Tensor, Tensor]:
    """Every window of the series: what is known [windows, 24] and what follows [windows, 12]."""
    windows = series.unfold(0, PAST + FUTURE, 1)
    return windows[:, :PAST], windows[:, PAST:]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, series: Tensor) -> None:
    past, future = cut(series)
    for _ in range(STEPS):
        rows = torch.randint(len(past), (32,))
        F.mse_loss(model(past[rows]), future[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def find_error(model: nn.Module, series: Tensor) -> float:
    """The squared error in percent of the variance."""
    past, future = cut(series)
    return 100 * float(F.mse_loss(model(past), future) / future.var())


def main() -> None:
    torch.manual_seed(0)
    office, canteen = {"peaks": (12,), "weekend": 0.2}, {"peaks": (7, 13, 19), "weekend": 0.9}
    model = Forecaster()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), make_series(12, **office))

    example = (torch.zeros(2, PAST),)
    adapted = ac.compile_with_adapters(model, example, config=ac.AdapterConfig(rank=6, alpha=6, sites="auto"))
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=4, total_steps=STEPS))
    train(adapted, optimizer, make_series(6, **canteen))

    own, other = make_series(4, **office), make_series(4, **canteen)
    merged = adapted.fold()
    table = Table("series", "model", "squared error, % of the variance", title="error of twelve hours")
    errors = {
        ("office", "as trained"): find_error(model, own),
        ("canteen", "as trained"): find_error(model, other),
        ("canteen", "adapted"): find_error(adapted, other),
        ("canteen", "folded"): find_error(merged, other),
    }
    for (series, name), error in errors.items():
        table.add_row(series, name, f"{error:.1f}%")
    Console().print(table)
    for name, rank in budget.ranks().items():
        Console().print(f"rank {rank}: {name}", highlight=False)

    _, before, after, folded = errors.values()
    assert after < before / 2, "the adapters should have learned the other rhythm"
    assert abs(after - folded) < 1e-3, "folding must not change a forecast"
    assert any(rank for name, rank in budget.ranks().items() if "lstm" in name), "recurrent weights have adapters"
    assert budget.live_triplets == 4 * len(adapted.sites), "the budget is met exactly"


if __name__ == "__main__":
    main()

"""Regression of a time series: a perceptron forecasts one family of oscillators, and is adapted to another.

    x'' = μ (1 − x²) x' − x + a sin(ω t)      van der Pol with a drive, in steps of 0.1, with noise

It sees the last 24 values and forecasts the next 8.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks.base import ERROR, Examples, Task, pretrain, squared_error

_SEEN, _AHEAD, _WIDTH, _STEPS = 24, 8, 128, 1500


class Forecaster(nn.Module):
    """Three hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (_SEEN, _WIDTH, _WIDTH, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(_WIDTH, _AHEAD)

    def forward(self, values: Tensor) -> Tensor:
        """[batch, 24] to [batch, 8]."""
        for layer in self.layers:
            values = torch.tanh(layer(values))
        forecast: Tensor = self.head(values)
        return forecast


def make_series(seed: int, draw: int) -> Task:
    """The forecaster after one family, and examples of the other; 100 % of the variance is a forecast of the mean."""
    parts = [_simulate(10_000 * seed + 10 * draw + k, count, adapted=True) for k, count in enumerate((200, 200, 1000))]
    return Task(
        name="series",
        model=_pretrain(seed),
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        sites=("layers.*",),
        targets=r"layers\.\d",
        measure=ERROR,
    )


@functools.cache
def _pretrain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    examples = _simulate(7 + 10_000 * seed, 4000, adapted=False)
    return pretrain(Forecaster(), examples, squared_error, steps=_STEPS, seed=seed)


def _simulate(seed: int, count: int, *, adapted: bool) -> Examples:
    """Pieces of oscillations with random parameters, scaled to a variance of about 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    mu, drive, pace = (draw(2, 4), draw(0.5, 1), draw(1, 2)) if adapted else (draw(0.2, 1), draw(0, 0.3), draw(0.2, 1))
    x, v, phase, found = draw(-2, 2), draw(-2, 2), draw(0, 6.3), []
    for step in range(10 * (40 + _SEEN + _AHEAD)):  # Euler steps of 0.01
        force = mu * (1 - x**2) * v - x + drive * torch.sin(pace * 0.01 * step + phase)
        x, v = x + 0.01 * v, v + 0.01 * force
        if step % 10 == 0:
            found.append(x)
    values = torch.stack(found[-_SEEN - _AHEAD :], 1) / 1.45
    noise = 0.02 * torch.randn(values.shape, generator=generator)
    return {"values": (values + noise)[:, :_SEEN]}, values[:, _SEEN:]

"""Small models to train."""

from __future__ import annotations

import torch
from torch import nn

#: Examples for :class:`GatedNet`.
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class GatedNet(nn.Module):
    """Four layers of which two are multiplied, [batch, 6] to [batch, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.query, self.key = nn.Linear(10, 8), nn.Linear(10, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(x))
        y: torch.Tensor = self.down(torch.tanh(self.query(x) * self.key(x)))
        return y


class Net(nn.Module):
    """Running statistics, dropout, and a head to train fully, [batch, 6] to [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.2)
        self.down, self.head = nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.tanh(self.norm(self.up(x))))
        y: torch.Tensor = self.head(torch.tanh(self.down(x)))
        return y

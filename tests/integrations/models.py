"""Small models and data that the integrations are tried with; libraries that are missing skip the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import adapter_compiler as ac


class Net(nn.Module):
    """Two linear layers with a loss, as transformers' models return it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.second(torch.tanh(self.first(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_adapted(rank: int = 4, **options: Any) -> ac.AdaptedModel:
    """The net with adapters, always the same."""
    net = Net()
    torch.manual_seed(1)
    return ac.compile_with_adapters(net, (torch.randn(2, 6),), config=ac.AdapterConfig(rank=rank, **options))


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that depend on their number alone, with a column that no model takes."""

    def __init__(self, count: int = 32) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": int(x[:2].sum() > 0) + 2 * int(x[2] > 0), "index": index}


def values_of(adapted: ac.AdaptedModel) -> dict[str, torch.Tensor]:
    """The adapters' parameters, copied."""
    return {name: p.detach().clone() for name, p in adapted.adapters.named_parameters()}


def draw_values(adapted: ac.AdaptedModel) -> None:
    """Give every adapter parameter another value."""
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)

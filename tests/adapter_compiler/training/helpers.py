"""Training helpers: adapted models with artificial gradients, so that a run of many steps is cheap."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import adapter_compiler as ac


def make_adapted(
    shapes: tuple[tuple[int, int], ...] = ((6, 8), (8, 4), (4, 7)),
    *,
    rank: int = 4,
    gamma: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> ac.AdaptedModel:
    """Linear layers of the (in, out) shapes, named by their positions; λ ≠ 0, so that triplets have scores."""
    model = nn.ModuleList([nn.Linear(fan_in, out) for fan_in, out in shapes])
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=rank, gamma=gamma, dtype=dtype))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapted


def set_gradients(adapted: ac.AdaptedModel, scale: float = 1.0) -> None:
    """Set normal gradients for every adapter parameter, from torch's global generator."""
    for parameter in adapted.trainable_parameters():
        parameter.grad = torch.randn_like(parameter) * scale


def find_lambdas(adapted: ac.AdaptedModel) -> dict[str, Tensor]:
    """λ of every site by its name, detached but not copied."""
    named = adapted.adapters.named_parameters()
    return {name.removesuffix(".lam"): p.detach() for name, p in named if name.endswith(".lam")}


def count_nonzero(adapted: ac.AdaptedModel) -> int:
    """How many λ are not exactly zero."""
    return int(sum(int(lam.count_nonzero()) for lam in find_lambdas(adapted).values()))


def run(
    adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, steps: int, *, seed: int | None = None
) -> Iterator[int]:
    """Take steps with normal gradients; yields the number of each step, from 1, after it."""
    for step in range(1, steps + 1):
        if seed is not None:
            torch.manual_seed(1000 * seed + step)
        set_gradients(adapted)
        optimizer.step()
        yield step


def snapshot(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, budget: ac.RankBudget) -> dict[str, Any]:
    """A copy of everything that a step may change."""
    return copy.deepcopy(
        {"model": adapted.state_dict(), "optimizer": optimizer.state_dict(), "budget": budget.state_dict()}
    )


def assert_same(found: Any, expected: Any, path: str = "state") -> None:
    """Check that nested values are equal bit for bit; nan equals nan."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{path}: {m}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    else:
        assert found == expected, path

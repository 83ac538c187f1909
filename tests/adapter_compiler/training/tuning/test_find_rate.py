"""Rates are found by trials that leave no trace, and a quadratic has the optimum that it must have."""

from __future__ import annotations

import copy
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.training.tuning.find_rate import _schedule
from tests.adapter_compiler.training.helpers import assert_same
from tests.adapter_compiler.training.models import Net

Batch = tuple[torch.Tensor, torch.Tensor]


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    random.random()  # a loader that draws from Python's generator
    np.random.rand()
    value: torch.Tensor = (model(x) - y).square().mean()
    return value


def make(steps: int = 0, *, budget: bool = True) -> tuple[ac.AdaptedModel, torch.optim.Optimizer, Any, list[Batch]]:
    torch.manual_seed(3)
    batches = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(12)]
    config = ac.AdapterConfig(rank=4, trainable=("head*",))
    adapted = ac.compile_with_adapters(Net(), (batches[0][0],), config=config)
    optimizer = adapted.make_optimizer(0.01, other_lr=0.002, weight_decay=0.01)
    schedule = ac.BudgetSchedule(
        target_rank=2, total_steps=10, warmup_steps=1, final_steps=4, interval=2, compact=True
    )  # fmt: skip
    found = ac.RankBudget(adapted, optimizer, schedule) if budget else None
    train(adapted, optimizer, batches[:steps])
    return adapted, optimizer, found, batches


def train(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss(adapted, batch).backward()
        optimizer.step()


def snapshot(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, budget: Any) -> Any:
    """Copies of everything that a step may change."""
    numbers: Any = np.random.get_state()
    return copy.deepcopy(
        {
            "model": adapted.state_dict(),
            "gradients": [p.grad for p in adapted.parameters()],
            "modes": [module.training for module in adapted.modules()],
            "ranks": [(adapter.site.name, adapter.rank) for adapter in adapted.plan],
            "optimizer": optimizer.state_dict(),
            "budget": None if budget is None else budget.state_dict(),
            "random": [torch.get_rng_state(), random.getstate(), numbers[1].tolist(), numbers[2:]],
        }
    )


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("steps", [0, 4, 9])
def test_everything_is_put_back(steps: int, validated: bool) -> None:
    """At step 0 there are no moments yet; the trials of step 4 compact the adapters; at step 9 they are compacted."""
    adapted, optimizer, budget, batches = make(steps)
    before = snapshot(adapted, optimizer, budget)
    identities = [id(p) for p in adapted.parameters()]
    found = ac.find_rate(adapted, optimizer, loss, batches, rates=(1e-3, 1e-2), validation=batches * validated)
    assert_same(snapshot(adapted, optimizer, budget), before)
    assert [id(p) for p in adapted.parameters()] == identities
    assert set(found.losses) >= {1e-3, 1e-2}
    # The run goes on as one in which nothing was tried.
    other = make(steps)
    torch.set_rng_state(before["random"][0])
    train(adapted, optimizer, batches)
    torch.set_rng_state(before["random"][0])
    train(other[0], other[1], other[3])
    assert_same(adapted.state_dict(), other[0].state_dict())
    assert_same(optimizer.state_dict(), other[1].state_dict())
    assert_same(budget.state_dict(), other[2].state_dict())


def test_everything_is_put_back_if_the_loss_raises() -> None:
    adapted, optimizer, budget, batches = make(4)
    before = snapshot(adapted, optimizer, budget)
    count = 0

    def fail(model: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 17:
            raise RuntimeError("no memory")
        return loss(model, batch)

    with pytest.raises(RuntimeError, match="no memory"):
        ac.find_rate(adapted, optimizer, fail, batches)
    assert_same(snapshot(adapted, optimizer, budget), before)


def test_a_trial_is_the_run_that_it_stands_for() -> None:
    """The loss of each rate, against a run from scratch with a loop of our own."""
    adapted, optimizer, _, batches = make(3, budget=False)
    torch.manual_seed(11)
    found = ac.find_rate(adapted, optimizer, loss, batches, rates=(1e-3, 4e-3, 1.6e-2), steps=8)
    for rate, expected in found.losses.items():
        adapted, optimizer, _, batches = make(3, budget=False)
        torch.manual_seed(11)
        seen = []
        for step in range(8):
            for group, share in zip(optimizer.param_groups, (1, 1, 0.2, 0.2), strict=True):
                group["lr"] = rate * share * _schedule(step, 8)
            optimizer.zero_grad()
            value = loss(adapted, batches[step])
            seen.append(float(value.detach()))
            value.backward()
            optimizer.step()
        assert sum(seen[-2:]) / 2 == expected


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    shares = [_schedule(step, 100) for step in range(100)]
    assert max(shares) == shares[9] == 1
    assert shares[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert 0 < shares[-1] < 0.02


class Scalar(nn.Module):
    """y = W x with one weight of 1 × 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def make_quadratic() -> tuple[ac.AdaptedModel, torch.optim.Optimizer]:
    """Gradient descent on B alone: with A = 1 and W = 0 the loss is (B − 1)² / 2; a step multiplies B − 1 by 1 − lr."""
    model = Scalar().double()
    nn.init.zeros_(model.layer.weight)
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(kind="lora", rank=1, alpha=1))
    A, B = (adapted.adapters.keyed_parameters["layer.weight", name] for name in ("A", "B"))
    with torch.no_grad():
        A.fill_(1)
        B.zero_()
    groups: list[dict[str, Any]] = [{"params": [B]}, {"params": [A], "lr": 0.0}]
    return adapted, torch.optim.SGD(groups, lr=0.01)


def half_square(model: nn.Module, _: None) -> torch.Tensor:
    value: torch.Tensor = (model(torch.ones(1, 1, dtype=torch.float64)) - 1).square().sum() / 2
    return value


def test_the_best_rate_of_a_quadratic_is_found_from_far_away() -> None:
    adapted, optimizer = make_quadratic()
    steps = 20
    found = ac.find_rate(adapted, optimizer, half_square, [None], steps=steps)
    shares = [_schedule(step, steps) for step in range(steps)]

    def simulate(rate: float) -> float:
        rest, seen = 1.0, []
        for share in shares:
            seen.append(rest**2 / 2)
            rest *= 1 - rate * share
        return sum(seen[-5:]) / 5

    for rate, value in found.losses.items():
        assert value == pytest.approx(simulate(rate), rel=1e-9)
    grid = [10 ** (k / 200) for k in range(-600, 200)]
    optimum = min(grid, key=simulate)
    assert found.is_inside
    assert optimum / 1.6 < found.best < optimum * 1.6
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_rates_that_diverge_are_inf() -> None:
    adapted, optimizer = make_quadratic()
    found = ac.find_rate(adapted, optimizer, half_square, [None], steps=200, rates=(0.5, 1e200))
    assert found.losses[1e200] == math.inf
    assert found.best < 1e200
    with pytest.raises(ConfigError, match=r"the loss of every trial became inf or nan, at rates from \S+ to 1e\+250"):
        ac.find_rate(adapted, optimizer, half_square, [None], steps=200, rates=(1e240, 1e250))


def test_the_edge_is_said() -> None:
    adapted, optimizer = make_quadratic()
    found = ac.find_rate(adapted, optimizer, half_square, [None], steps=20, rates=(1e-8,))
    assert not found.is_inside
    assert "at the edge" in str(found)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 3}, "find_rate(steps=3): expected an integer of at least 4"),
    "rates": ({"rates": (0.1, -1)}, "find_rate(rates=(0.1, -1)): expected positive numbers"),
    "none": ({"rates": ()}, "find_rate(rates=()): expected positive numbers"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_options_that_cannot_work(name: str) -> None:
    options, text = FAILURES[name]
    adapted, optimizer = make_quadratic()
    with pytest.raises(ConfigError, match=re.escape(text)):
        ac.find_rate(adapted, optimizer, half_square, [None] * 5, **options)


def test_an_optimizer_of_something_else_is_refused() -> None:
    adapted, _ = make_quadratic()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="does not hold 2 of 2 trainable parameters"):
        ac.find_rate(adapted, other, half_square, [None] * 5)


def test_a_rate_of_zero_is_refused() -> None:
    adapted, _ = make_quadratic()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    with pytest.raises(ConfigError, match="first group has lr=0, expected more than 0"):
        ac.find_rate(adapted, optimizer, half_square, [None] * 5)

"""A run that stops anywhere and resumes from saved states equals the uninterrupted run bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from tests.adapter_compiler.training.helpers import assert_same, make_adapted, run, snapshot

STEPS = 16


def make_schedule(semantics: str = "paper", **options: Any) -> ac.BudgetSchedule:
    usual = {"target_rank": 2, "total_steps": STEPS, "warmup_steps": 2, "final_steps": 6, "interval": 3}
    return ac.BudgetSchedule(**usual | options, semantics=semantics)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 5), nn.BatchNorm1d(5))


def compile_net(seed: int) -> ac.AdaptedModel:
    """A model with the same weights each time, and adapters that depend on the seed."""
    net = make_net()
    torch.manual_seed(seed)
    return ac.compile_with_adapters(net, (torch.randn(4, 6),), config=ac.AdapterConfig(rank=4, gamma=0.1))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02, amsgrad=True, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def train(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Train from step ``start`` to ``stop``; data and dropout depend only on the step."""
    adapted.train()
    for step in range(start, stop):
        torch.manual_seed(100 + step)
        x = torch.randn(4, 6)
        loss: Tensor = (adapted(x) - x[:, :5]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(state: Any) -> Any:
    """Write to a file and read it back with ``weights_only``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_stopped_at_any_step_it_resumes_bit_for_bit(semantics: str, kind: str) -> None:
    adapted, make_optimizer = compile_net(1), OPTIMIZERS[kind]
    optimizer = make_optimizer(adapted.trainable_parameters())
    budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
    states = []
    for step in range(STEPS):
        states.append(save(snapshot(adapted, optimizer, budget)))
        train(adapted, optimizer, step, step + 1)
    expected = snapshot(adapted, optimizer, budget)
    ranks, history = budget.ranks(), budget.history
    assert budget.is_frozen
    budget.detach()

    for stop in (0, 1, 2, 3, 5, 8, 9, 10, 11, 15):
        with torch.no_grad():
            for tensor in (*adapted.adapters.parameters(), *adapted.buffers()):
                tensor.fill_(7)
        other_optimizer = make_optimizer(adapted.trainable_parameters())
        other = ac.RankBudget(adapted, other_optimizer, make_schedule(semantics))
        adapted.load_state_dict(states[stop]["model"])
        other_optimizer.load_state_dict(states[stop]["optimizer"])
        other.load_state_dict(states[stop]["budget"])
        assert_same(snapshot(adapted, other_optimizer, other), states[stop])
        train(adapted, other_optimizer, stop, STEPS)
        assert_same(snapshot(adapted, other_optimizer, other), expected, f"stopped before step {stop}")
        assert (other.ranks(), other.history) == (ranks, history)
        other.detach()


def test_a_new_process_resumes_from_saved_adapters(tmp_path: Any) -> None:
    """The same with new objects, and the model's part read by load_adapters."""
    adapted = compile_net(1)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    train(adapted, optimizer, 0, 8)
    adapted.save(tmp_path)
    state = save({"optimizer": optimizer.state_dict(), "budget": budget.state_dict()})
    train(adapted, optimizer, 8, STEPS)

    other = compile_net(2)
    other_optimizer = torch.optim.AdamW(other.trainable_parameters(), lr=0.02)
    other_budget = ac.RankBudget(other, other_optimizer, make_schedule())
    ac.load_adapters(other, tmp_path)
    other_optimizer.load_state_dict(state["optimizer"])
    other_budget.load_state_dict(state["budget"])
    train(other, other_optimizer, 8, STEPS)
    assert_same(snapshot(other, other_optimizer, other_budget), snapshot(adapted, optimizer, budget))


def test_a_state_is_a_copy() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in run(adapted, optimizer, 5):
        pass
    state = budget.state_dict()
    kept = save(state)
    for _ in run(adapted, optimizer, 5):
        pass
    assert_same(save(state), kept)
    budget.load_state_dict(state)
    for _ in run(adapted, optimizer, 5):
        pass
    assert_same(save(state), kept)


def cut(state: dict[str, Any]) -> None:
    del state["sites"]["0.weight"]


def add(state: dict[str, Any]) -> None:
    state["sites"]["9.weight"] = state["sites"]["0.weight"]


def forget(state: dict[str, Any]) -> None:
    del state["history"]


def age(state: dict[str, Any]) -> None:
    state["version"] = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"other sites: 0\.weight is in this model only"),
        (add, r"other sites: 9\.weight is in the state only"),
        (forget, r"the key 'history' is missing, .*give a state from RankBudget\.state_dict\(\)"),
        (age, "has version 0, expected 1"),
        (dict.clear, "has version None, expected 1"),
    ],
)
def test_a_spoilt_state_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in run(adapted, optimizer, 7):
        pass
    state = budget.state_dict()
    for _ in run(adapted, optimizer, 3):
        pass
    before = snapshot(adapted, optimizer, budget)
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        budget.load_state_dict(state)
    assert_same(snapshot(adapted, optimizer, budget), before)


@pytest.mark.parametrize(
    ("shapes", "rank", "schedule", "message"),
    [
        ((), 4, {"interval": 2}, "made with interval=3, this budget has interval=2; resume with the same"),
        ((), 4, {"semantics": "peft"}, "made with semantics='paper', this budget has semantics='peft'"),
        ((), 3, {}, r"at site 0\.weight has .*\(4, 'float'\).*this model has .*\(3, 'float'\).*with the same rank"),
        (((6, 8), (8, 4), (4, 9)), 4, {}, r"at site 2\.weight has .*\(7, 4, 'float'\).*model has .*\(9, 4, 'float'\)"),
    ],
    ids=["interval", "semantics", "rank", "width"],
)
def test_the_state_of_another_run_is_refused(shapes: Any, rank: int, schedule: dict[str, Any], message: str) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    state = ac.RankBudget(adapted, optimizer, make_schedule()).state_dict()
    other = make_adapted(shapes or ((6, 8), (8, 4), (4, 7)), rank=rank)
    other_optimizer = torch.optim.AdamW(other.trainable_parameters(), lr=0.02)
    budget = ac.RankBudget(other, other_optimizer, make_schedule(**schedule))
    before = snapshot(other, other_optimizer, budget)
    with pytest.raises(CheckpointError, match=message):
        budget.load_state_dict(state)
    assert_same(snapshot(other, other_optimizer, budget), before)

"""What a budget reports: records, observers, and warnings that name a cause."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import MissingDependencyError
from adapter_compiler.training.budget import MaskingRecord, TensorBoardObserver
from tests.adapter_compiler.training.helpers import make_adapted, run


class Writer:
    """A replacement for SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def make_budget(adapted: ac.AdaptedModel, **options: Any) -> tuple[torch.optim.Optimizer, ac.RankBudget]:
    observers = options.pop("observers", ())
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    settings: dict[str, Any] = {"target_rank": 2, "total_steps": 12, "warmup_steps": 1, "final_steps": 4, "interval": 3}
    schedule = ac.BudgetSchedule(**{**settings, **options})
    return optimizer, ac.RankBudget(adapted, optimizer, schedule, observers=observers)


def test_records_hold_budget_live_ranks_and_loss() -> None:
    adapted = make_adapted()
    seen: list[MaskingRecord] = []
    optimizer, budget = make_budget(adapted, observers=[seen.append])
    for step in run(adapted, optimizer, 10):
        budget.note_loss(torch.tensor(10.0 - step, requires_grad=True))
    assert [record.step for record in budget.history] == [3, 6, 8]
    assert seen == budget.history
    for record in budget.history:
        assert record.live == record.budget == sum(record.ranks.values())
        assert record.loss == 10 - (record.step - 1), "the last loss before that step's masking"
    assert budget.history[-1].live == 6


def test_tensorboard_gets_every_record() -> None:
    adapted, writer = make_adapted(), Writer()
    optimizer, budget = make_budget(adapted, observers=[TensorBoardObserver(writer, prefix="a")])
    list(run(adapted, optimizer, 9))
    assert ("a/budget", 6, 8) in writer.scalars
    assert ("a/live", 6, 8) in writer.scalars
    for site, rank in budget.ranks().items():
        assert (f"a/rank/{site}", rank, 8) in writer.scalars
    assert not any(tag == "a/loss" for tag, _, _ in writer.scalars), "no loss was given"


def test_a_folder_without_tensorboard_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(MissingDependencyError, match=r"TensorBoardObserver\('.*runs'\) .* pip install tensorboard"):
        TensorBoardObserver(tmp_path / "runs")


def test_parameters_without_gradient_are_named_once_with_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    adapted = make_adapted()
    optimizer, _ = make_budget(adapted)
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        for _ in range(5):
            optimizer.step()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("3 of 3 sites had no gradient for 3 steps until step 3 (first: 0.weight): ")
    assert "the adapted model was not called" in message


def test_a_loss_without_gradients_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2, trainable=()))
    optimizer, _ = make_budget(adapted, target_rank=1)
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        for _ in range(4):
            adapted(x).square().sum().backward()
            optimizer.zero_grad()
            optimizer.step()
    (message,) = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert "zero_grad() between backward() and step()" in message


def test_a_budget_in_parameters_is_never_overspent() -> None:
    adapted = make_adapted()
    costs = {site.name: site.out_features + site.in_features + 1 for site in adapted.sites}
    optimizer, budget = make_budget(adapted, target_rank=None, target_parameters=60)
    assert budget.budget == sum(4 * cost for cost in costs.values())
    for _ in run(adapted, optimizer, 9):
        spent = sum(rank * costs[site] for site, rank in budget.ranks().items())
        assert budget.live_parameters == spent
        if budget.history:
            assert spent <= budget.history[-1].budget
    assert budget.budget == 60
    assert 60 - min(costs.values()) < spent <= 60


@pytest.mark.parametrize("shape", ["cubic", "linear", "constant", lambda p: 1 - p**2])
def test_shapes_of_the_schedule(shape: Any) -> None:
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=100, warmup_steps=10, final_steps=10, shape=shape)
    found = [schedule.budget(step, 120, 20) for step in (10, 11, 50, 89, 90, 100)]
    assert found[0] == 120
    assert found[-2:] == [20, 20]
    assert found == sorted(found, reverse=True)
    progress = (50 - 10) / 80
    left = {"cubic": (1 - progress) ** 3, "linear": 1 - progress, "constant": 0.0}.get(shape, 1 - progress**2)
    assert found[2] == int(20 + 100 * left)


def test_growing_brings_pruned_triplets_back() -> None:
    changes = []
    for grow in (0.0, 0.5):
        torch.manual_seed(0)
        adapted = make_adapted()
        optimizer, budget = make_budget(
            adapted, total_steps=30, interval=2, shape="constant", allocation=ac.Allocation(grow=grow)
        )
        masks, revived = [], 0
        for _ in run(adapted, optimizer, 20, seed=3):
            masks.append(budget.state_dict()["sites"])
            if len(masks) > 1:
                now, before = masks[-1], masks[-2]
                revived += sum(int((now[site]["mask"] & ~before[site]["mask"]).sum()) for site in now)
            assert budget.live_triplets in (12, 6)
        changes.append(revived)
    assert changes[1] > changes[0]


def test_redistribution_gives_ranks_in_proportion_to_the_change_of_the_weight() -> None:
    adapted = make_adapted()
    allocation = ac.Allocation(allocator="redistribute", min_rank=1)
    optimizer, budget = make_budget(adapted, allocation=allocation, total_steps=6, warmup_steps=0, final_steps=1)
    with torch.no_grad():
        for name, factor in (("0.weight", 0.01), ("1.weight", 0.01), ("2.weight", 3.0)):
            for parameter in adapted.adapters.get_submodule(name).parameters():
                parameter.normal_(0, 0.3).mul_(factor)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    list(run(adapted, optimizer, 6))
    assert budget.ranks() == {"0.weight": 1, "1.weight": 1, "2.weight": 4}


@pytest.mark.parametrize("start", ["pissa", "lora_ga", "orthogonal"])
def test_there_is_a_warning_if_adapters_start_from_the_weight(start: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without training, the weight afterwards lacks the start of the pruned triplet."""
    model, x = nn.Linear(6, 5).double(), torch.randn(8, 6).double()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(batch)
        return output.square().mean()

    config = ac.AdapterConfig(rank=3, gamma=0, init=None if start == "lora_ga" else start)
    adapted = ac.compile_with_adapters(model, (x,), config=config)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=4))
    if start == "lora_ga":
        ac.initialize_adapters(adapted, "lora_ga", [x], loss)
    (adapter,) = adapted.plan
    p = {name: value.detach().clone() for name, value in adapted.adapters.parameters_of(adapter).items()}
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        for _ in range(4):
            loss(adapted, x).backward()
            optimizer.step()
    assert budget.live_triplets == 2
    lam = adapted.adapters.parameters_of(adapter)["lam"]
    gone = adapter.scale * (p["P"] * (p["lam"] - lam)) @ p["Q"]
    folded = dict(adapted.fold().named_parameters())
    torch.testing.assert_close(folded["weight"], model.weight - gone)
    messages = [record.getMessage() for record in caplog.records if "pruning" in record.getMessage()]
    if start == "orthogonal":
        assert not messages and not gone.any()
    else:
        assert len(messages) == 1 and messages[0].startswith("1 of 1 sites start from a part of the weight itself")
        assert gone.norm() > 0.1


def test_the_warning_is_only_for_sites_that_can_be_pruned(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(8, 6)
    rules = (ac.AdapterRule(name="0.weight", kind="lora"),)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=3, init="pissa", rules=rules))
    optimizer, _ = make_budget(adapted)
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        adapted(x).square().mean().backward()
        optimizer.step()
    (message,) = [record.getMessage() for record in caplog.records if "pruning" in record.getMessage()]
    assert message.startswith("1 of 1 sites start from a part of the weight itself (pissa, lora_ga; first: 1.weight)")

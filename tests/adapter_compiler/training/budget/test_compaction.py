"""Compaction during training: same outputs, same optimizer object, cut optimizer state, and training continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError
from tests.adapter_compiler.training.models import GatedNet, X

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def make_run(
    name: str = "adamw", *, gamma: float = 0.05, **options: Any
) -> tuple[ac.AdaptedModel, torch.optim.Optimizer, ac.RankBudget]:
    torch.manual_seed(0)
    adapted = ac.compile_with_adapters(GatedNet().double(), (X,), config=ac.AdapterConfig(rank=5, gamma=gamma))
    optimizer = OPTIMIZERS[name](adapted.trainable_parameters())
    settings = {"target_rank": 1.5, "total_steps": 20, "warmup_steps": 2, "final_steps": 8, "interval": 2, **options}
    return adapted, optimizer, ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(**settings))


def train(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    loss = torch.zeros(())
    for _ in range(steps):
        loss = (adapted(X) - X.flip(0)).square().mean()  # the old loss, and its graph, exist until the next step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outputs_do_not_change_and_everything_shrinks(name: str) -> None:
    adapted, optimizer, budget = make_run(name)
    loss = train(adapted, optimizer, 13)
    assert budget.is_frozen
    ranks, expected = budget.ranks(), adapted(X)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    assert budget.compact() == ranks
    torch.testing.assert_close(adapted(X), expected, rtol=1e-12, atol=1e-12)
    assert loss.requires_grad, "the last graph still exists here"
    left = [[id(p) for p in group if p.requires_grad] for group in groups]  # empty sites have nothing to train
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == left
    assert sum(map(len, left)) == 3 * sum(rank > 0 for rank in ranks.values())
    for adapter in adapted.plan:
        parameters = adapted.adapters.parameters_of(adapter)
        assert adapter.rank == ranks[adapter.site.name] == len(parameters["lam"])
        for parameter in parameters.values():
            for key, tensor in optimizer.state[parameter].items():
                if tensor.dim() and "row" not in key and "col" not in key:
                    assert tensor.shape == parameter.shape
    assert adapted.adapters.flat is not None
    assert budget.live_triplets == sum(ranks.values()) == 6
    train(adapted, optimizer, 3)
    assert budget.ranks() == ranks
    merged = adapted.fold()
    torch.testing.assert_close(merged(X), adapted(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw", "fused"])
def test_training_continues_as_with_the_mask(name: str) -> None:
    """Elementwise optimizers do not depend on the removed triplets.

    The regularizer does: a pruned column of P changes the gradients of the live ones, so it is not used here.
    """
    runs = [make_run(name, gamma=0), make_run(name, gamma=0, compact=True)]
    for adapted, optimizer, _ in runs:
        train(adapted, optimizer, 20)
    (masked, _, first), (compacted, _, second) = runs
    assert first.ranks() == second.ranks()
    assert any(adapter.rank < 5 for adapter in compacted.plan)
    torch.testing.assert_close(compacted(X), masked(X), rtol=1e-9, atol=1e-9)
    assert [record.ranks for record in first.history] == [record.ranks for record in second.history]


def test_empty_sites_run_without_adapter_and_stay_in_reports() -> None:
    adapted, optimizer, budget = make_run(
        allocation=ac.Allocation(max_rank={"query": 0}, min_rank={"key": 1}), target_rank=1
    )
    train(adapted, optimizer, 13)
    assert budget.ranks()["query.weight"] == 0
    expected = adapted(X)
    budget.compact()
    torch.testing.assert_close(adapted(X), expected, rtol=1e-12, atol=1e-12)
    assert type(adapted.module.get_submodule("query")) is nn.Linear
    assert type(adapted.module.get_submodule("key")) is not nn.Linear
    row = next(row for row in adapted.report().sites if row.name == "query.weight")
    assert (row.rank, row.live, row.parameters) == (0, 0, 0)
    assert adapted.report().unused == ()
    train(adapted, optimizer, 2)
    torch.testing.assert_close(adapted.fold()(X), adapted(X), rtol=1e-9, atol=1e-9)


def test_pruning_continues_after_compaction_within_the_schedule() -> None:
    adapted, optimizer, budget = make_run()
    train(adapted, optimizer, 6)
    before = budget.live_triplets
    assert 6 < before < 20
    budget.compact()
    assert sum(adapter.rank for adapter in adapted.plan) == before
    train(adapted, optimizer, 10)
    assert budget.live_triplets == budget.budget == 6


def test_accumulated_gradients_are_cut_too() -> None:
    adapted, optimizer, budget = make_run()
    train(adapted, optimizer, 13)
    adapted(X).square().mean().backward()
    before = {name: p.grad.clone() for name, p in adapted.adapters.named_parameters() if p.grad is not None}
    kept = {site: mask for site, mask in budget._columns()}
    budget.compact()
    for name, parameter in adapted.adapters.named_parameters():
        site, _, letter = name.rpartition(".")
        assert parameter.grad is not None
        cut = before[name][kept[site]] if letter in ("Q", "lam") else before[name][:, kept[site]]
        torch.testing.assert_close(parameter.grad, cut, rtol=0, atol=0)


def test_a_state_that_cannot_be_cut_is_refused_before_anything_changes() -> None:
    adapted, optimizer, budget = make_run("sgd")
    train(adapted, optimizer, 13)
    parameter = adapted.adapters.get_parameter("up.weight.Q")
    optimizer.state[parameter]["absmax"] = torch.zeros(7)
    before = {name: p.shape for name, p in adapted.adapters.named_parameters()}
    with pytest.raises(BudgetError, match=r"SGD keeps 'absmax' of shape \(7,\) for up\.weight\.Q of shape \(5, 6\)"):
        budget.compact()
    assert {name: p.shape for name, p in adapted.adapters.named_parameters()} == before
    assert optimizer.state[adapted.adapters.get_parameter("down.weight.P")]["momentum_buffer"].shape == (6, 5)


def test_a_second_compaction_changes_nothing() -> None:
    adapted, optimizer, budget = make_run(compact=True)
    train(adapted, optimizer, 15)
    before = {name: p.detach().clone() for name, p in adapted.adapters.named_parameters()}
    budget.compact()
    for name, parameter in adapted.adapters.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)

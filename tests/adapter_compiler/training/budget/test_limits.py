"""Budgets that no allocation can meet are refused when they are made; gradients without numbers when they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, NonFiniteGradientError

SITES = ("0.weight", "1.weight")


def make_adapted(**options: Any) -> ac.AdaptedModel:
    """Two sites of rank 3, whose triplets cost 4 + 6 + 1 and 6 + 5 + 1 parameters, and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    config = ac.AdapterConfig(**{"rank": 3, "sites": SITES, "trainable": ("2.*",), **options})
    return ac.compile_with_adapters(model, (torch.randn(3, 4),), config=config)


def make_budget(adapted: ac.AdaptedModel, allocation: ac.Allocation | None = None, **target: Any) -> ac.RankBudget:
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    schedule = ac.BudgetSchedule(
        total_steps=6, warmup_steps=0, final_steps=2, interval=1, allocation=allocation or ac.Allocation(), **target
    )
    return ac.RankBudget(adapted, optimizer, schedule)


@pytest.mark.parametrize("target", [1, 10])
def test_a_target_below_the_cost_of_a_triplet_is_refused(target: int) -> None:
    with pytest.raises(
        BudgetError,
        match=rf"BudgetSchedule\(target_parameters={target}\) is below the cost of one triplet, which is 11 at "
        "0.weight and no less elsewhere; expected at least 11; raise it",
    ):
        make_budget(make_adapted(), target_parameters=target)
    make_budget(make_adapted(), target_parameters=11)


@pytest.mark.parametrize(
    ("least", "target", "message"),
    [
        (
            2,
            {"target_rank": 1.5},
            r"Allocation\(min_rank=2\) keeps 4 triplets over 2 sites, .*target_rank=1.5\) leaves 3",
        ),
        ({"1.*": 3}, {"target_rank": 1}, r"min_rank={'1.\*': 3}\) keeps 3 triplets over 2 sites, .*leaves 2"),
        (1, {"target_parameters": 22}, r"keeps 23 parameters over 2 sites, .*target_parameters=22\) leaves 22"),
    ],
)
def test_least_ranks_above_the_target_are_refused(least: Any, target: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message + "; expected at most that; lower min_rank or raise target_"):
        make_budget(make_adapted(), ac.Allocation(min_rank=least), **target)


def test_least_ranks_at_the_target_are_met() -> None:
    adapted = make_adapted()
    budget = make_budget(adapted, ac.Allocation(min_rank=1), target_parameters=23)
    for _ in range(6):
        adapted(torch.randn(3, 4)).square().mean().backward()
        budget._chains[0][0].step()
        adapted.zero_grad()
    assert budget.ranks() == {"0.weight": 1, "1.weight": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_a_gradient_of_the_head_that_is_no_number_is_refused_and_nothing_changes(name: str, value: float) -> None:
    adapted = make_adapted()
    budget = make_budget(adapted, target_rank=1)
    optimizer = budget._chains[0][0]
    adapted(torch.randn(3, 4)).square().mean().backward()
    gradient = dict(adapted.module.named_parameters())[name].grad
    assert gradient is not None
    gradient.view(-1)[1] = value
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    with pytest.raises(
        NonFiniteGradientError, match=rf"parameter .*{name}: the gradient has inf or nan at step 1, expected finite"
    ):
        optimizer.step()
    assert budget.step == 0
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)


def test_large_gradients_of_the_head_are_none_that_are_no_numbers() -> None:
    adapted = make_adapted().half()
    budget = make_budget(adapted, target_rank=1)
    for name, parameter in adapted.named_parameters():
        parameter.grad = torch.full_like(parameter, 60000.0 if "module.2" in name else 0.0)
    budget._chains[0][0].param_groups[0]["lr"] = 0.0
    budget._chains[0][0].step()
    assert budget.step == 1


class Bag(nn.Module):
    """Embeddings whose gradients are sparse: one with an adapter, one that is trained fully."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4, sparse=True)
        self.out = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out((self.first(ids) + self.second(ids)).mean(1))
        return y


@pytest.mark.parametrize("fused", [True, False])
def test_sparse_gradients_are_followed_saved_and_checked(fused: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (3, 5))
    config = ac.AdapterConfig(rank=2, sites=("first.weight", "out.weight"), trainable=("second.*",), fused=fused)
    adapted = ac.compile_with_adapters(Bag(), (ids,), config=config)
    budget = make_budget(adapted, target_rank=1)
    optimizer = budget._chains[0][0]
    for _ in range(4):
        adapted(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted(ids).square().mean().backward()
    weight = adapted.base_weight("second.weight")
    assert weight.grad is not None
    expected = weight.grad.clone()
    assert expected.layout == torch.sparse_coo
    ac.save_training_state(tmp_path, adapted, optimizer, budget)
    optimizer.zero_grad()
    ac.load_training_state(tmp_path, adapted, optimizer, budget)
    assert weight.grad.layout == torch.sparse_coo
    assert torch.equal(weight.grad.to_dense(), expected.to_dense())
    weight.grad = weight.grad * float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"parameter .*second\.weight: the gradient has inf or nan"):
        optimizer.step()

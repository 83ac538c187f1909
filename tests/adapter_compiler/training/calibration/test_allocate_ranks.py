"""Ranks from data sum to the budget exactly, follow their rule, and make a plan that compiles."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 5)).double()
    with torch.no_grad():
        layers.get_parameter("0.weight").mul_(4)
    return layers


@pytest.fixture
def batches() -> list[Batch]:
    torch.manual_seed(1)
    # Inputs of rank 3, so that the first layer has only three directions.
    return [(torch.randn(16, 3).double() @ torch.randn(3, 12).double(), torch.randn(16, 5).double())]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adapt(model: nn.Module, batches: list[Batch], **options: object) -> ac.AdaptedModel:
    config = ac.AdapterConfig(rank=3, alpha=3, kind="lora", **options)  # type: ignore[arg-type]
    return ac.compile_with_adapters(model, (batches[0][0],), config=config)


@pytest.mark.parametrize("method", ["eva", "gora", "gradient"])
@pytest.mark.parametrize(("total", "least"), [(None, 0), (4, 0), (11, 2)])
def test_ranks_sum_to_the_budget_and_the_plan_compiles(
    method: str, total: int | None, least: int, model: nn.Module, batches: list[Batch]
) -> None:
    adapted = adapt(model, batches, init="pissa")
    before = copy.deepcopy(adapted.state_dict())
    allocation = ac.StaticAllocation(method=method, total=total, min_rank=least)
    plan = ac.allocate_ranks(adapted, allocation, batches, loss)
    ranks = [adapter.rank for adapter in plan]
    assert sum(ranks) == (9 if total is None else total)
    assert all(least <= rank <= 6 for rank in ranks)
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)
    again = ac.compile_with_adapters(model, (batches[0][0],), plan=plan)
    assert [adapter.rank for adapter in again.plan] == ranks
    assert [adapter.scale for adapter in again.plan] == [1.0, 1.0, 1.0]
    assert torch.equal(again(batches[0][0]), model(batches[0][0]))


def find_gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    own = copy.deepcopy(model)
    loss(own, batch).backward()
    return [p.grad for p in own.parameters() if p.dim() == 2 and p.grad is not None]


def test_eva_and_the_gradient_take_the_best_over_all_sites(model: nn.Sequential, batches: list[Batch]) -> None:
    adapted = adapt(model, batches)
    with torch.no_grad():
        inputs = [batches[0][0], model[:2](batches[0][0]), model[:4](batches[0][0])]
    for method, found in (
        ("eva", [torch.linalg.svdvals(x).square() / x.square().sum() for x in inputs]),
        ("gradient", [torch.linalg.svdvals(g) for g in find_gradients(model, batches[0])]),
    ):
        entries = sorted(((float(v), i) for i, values in enumerate(found) for v in values[:6]), reverse=True)[:7]
        expected = [sum(i == site for _, i in entries) for site in range(3)]
        plan = ac.allocate_ranks(adapted, ac.StaticAllocation(method=method, total=7), batches, loss)
        assert [adapter.rank for adapter in plan] == expected


def test_gora_is_in_proportion(model: nn.Sequential, batches: list[Batch]) -> None:
    adapted = adapt(model, batches)
    weights = [p for p in model.parameters() if p.dim() == 2]
    importance = [
        float((w.detach() * g).abs().mean()) / sum(w.shape) ** 0.5
        for w, g in zip(weights, find_gradients(model, batches[0]), strict=True)
    ]
    options = ac.StaticAllocation(method="gora", total=9, max_rank=9)
    ranks = [adapter.rank for adapter in ac.allocate_ranks(adapted, options, batches, loss)]
    bounds = [min(w.shape) for w in weights]
    for rank, share, bound in zip(ranks, importance, bounds, strict=True):
        quota = 9 * share / sum(importance)
        assert abs(rank - quota) < 1 or rank in (0, bound)


def test_a_total_that_cannot_be_met_is_refused(model: nn.Sequential, batches: list[Batch]) -> None:
    adapted = adapt(model, batches)
    with pytest.raises(ConfigError, match=r"the total is 18, expected a number from 0 to 17"):
        ac.allocate_ranks(adapted, ac.StaticAllocation(method="gora", total=18), batches, loss)
    with pytest.raises(ConfigError, match=r"StaticAllocation\(method='magic'\): expected one of 'eva', 'gora'"):
        ac.allocate_ranks(adapted, "magic", batches, loss)
    assert dataclasses.replace(ac.StaticAllocation(method="eva"), min_rank=1).min_rank == 1


def test_a_model_without_adapters_is_refused(model: nn.Sequential, batches: list[Batch]) -> None:
    with pytest.raises(ConfigError, match=r"allocate_ranks\(adapted=...\) is a Sequential, expected an AdaptedModel"):
        ac.allocate_ranks(model, "eva", batches, lambda model, batch: model(batch[0]))  # type: ignore[arg-type]

"""Plans are checked before any graph is edited."""

from __future__ import annotations

import pytest
import torch

from passes.base import SiteError
from passes.forms import SvdForm
from passes.plan import AdapterPlan, PlannedAdapter
from passes.sites import AdapterSite


def plan_one(rank: int, name: str = "w") -> PlannedAdapter:
    site = AdapterSite(name=name, shape=(5, 3), dtype=torch.float32)
    return PlannedAdapter(site=site, form=SvdForm(), rank=rank, scale=1.0, dtype=torch.float32)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(SiteError, match=rf"site w: rank {rank} does not fit a weight of 5 × 3; expected 0 to 3"):
        plan_one(rank)


def test_two_adapters_on_one_weight_are_refused() -> None:
    with pytest.raises(SiteError, match="more than one adapter planned for w"):
        AdapterPlan(adapters=(plan_one(1), plan_one(2)))


def test_shapes_and_order() -> None:
    plan = AdapterPlan(adapters=(plan_one(2, "b"), plan_one(3, "a")))
    assert [adapter.site.name for adapter in plan] == ["b", "a"]
    assert len(plan) == 2
    assert plan_one(2).parameter_shapes == {"P": (5, 2), "lam": (2,), "Q": (2, 3)}


def test_a_plan_for_some_weights_only() -> None:
    plan = AdapterPlan(adapters=(plan_one(2, "b"), plan_one(3, "a"), plan_one(1, "c")))
    assert [adapter.site.name for adapter in plan.restrict_to({"c": 0, "b": 1, "other": 2}.keys())] == ["c", "b"]
    assert plan.restrict_to(["a", "c", "b", "other"]) is plan
    assert len(plan.restrict_to([])) == 0

"""A compacted plan: its graph gives the outputs of the masked graph, without nodes for empty sites."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passes.adapt.insert_adapters import InsertAdaptersPass, find_adapted_sites
from passes.analysis.weight_uses import find_parameter_aliases
from passes.base import SiteError
from passes.planning.compact_plan import compact_plan, find_rank_dimensions


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)).double()


def mask(bench: Any, kept: dict[str, torch.Tensor]) -> None:
    for site, indices in kept.items():
        lam = bench.adapters.get_parameter(f"{site}.lam")
        dead = torch.ones(len(lam), dtype=torch.bool)
        dead[indices] = False
        lam.data[dead] = 0


@pytest.mark.parametrize(
    ("first", "second"), [([0, 2], [1]), ([], [0, 1, 2]), ([1], []), ([], []), ([0, 1, 2], [0, 1, 2])]
)
def test_outputs_are_those_of_the_masked_graph(
    prepare: Callable[..., Any], first: list[int], second: list[int]
) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    bench = prepare(make_model(), x, rank=3)
    bench.insert(bench.graph_module)
    bench.randomize()
    kept = {"0.weight": torch.tensor(first, dtype=torch.long), "2.weight": torch.tensor(second, dtype=torch.long)}
    mask(bench, kept)
    expected = bench.graph_module(x)
    small = compact_plan(bench.plan, kept)
    parameters = copy.deepcopy(bench.adapters)
    for adapter in bench.plan:
        owner, indices = parameters.get_submodule(adapter.site.name), kept[adapter.site.name]
        for name, dimension in find_rank_dimensions(adapter).items():
            values = owner.get_parameter(name).detach().index_select(dimension, indices)
            owner.register_parameter(name, nn.Parameter(values))
    fresh = prepare(bench.module, x, rank=3)
    fresh.graph_module.add_submodule("adapters", parameters)
    inserted = InsertAdaptersPass(plan=small, aliases=find_parameter_aliases(bench.module))(fresh.graph_module)
    torch.testing.assert_close(inserted.graph_module(x), expected, rtol=1e-12, atol=1e-12)
    assert find_adapted_sites(inserted.graph_module) == {site for site, indices in kept.items() if len(indices)}


def test_a_plan_keeps_its_scales_and_order(prepare: Callable[..., Any]) -> None:
    bench = prepare(make_model(), torch.randn(3, 5, dtype=torch.float64), rank=3)
    plan = compact_plan(bench.plan, {"2.weight": torch.tensor([0, 2])})
    assert [(a.site.name, a.rank, a.scale) for a in plan] == [("0.weight", 3, 0.5), ("2.weight", 2, 0.5)]
    assert find_rank_dimensions(plan.adapters[0]) == {"P": -1, "lam": -1, "Q": -2}


@pytest.mark.parametrize("indices", [[3], [1, 0], [1, 1], [-1]])
def test_invalid_indices_are_refused(prepare: Callable[..., Any], indices: list[int]) -> None:
    bench = prepare(make_model(), torch.randn(3, 5, dtype=torch.float64), rank=3)
    with pytest.raises(SiteError, match=r"site 0.weight: cannot keep triplets .* expected ascending indices below 3"):
        compact_plan(bench.plan, {"0.weight": torch.tensor(indices)})
    with pytest.raises(SiteError, match=r"no adapter is planned for 9\.weight"):
        compact_plan(bench.plan, {"9.weight": torch.tensor([0])})

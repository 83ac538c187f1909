"""FoldAdaptersPass and merge_weight: the results, what does not change, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.adapt.fold_adapters import FoldAdaptersPass, merge_weight
from passes.base import PostconditionError, SiteError
from passes.forms import SvdForm
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.selection import SiteSelection
from passes.planning.site import AdapterSite

Prepare = Callable[..., Any]


class Mixed(nn.Module):
    """A chain in which two products use one weight in opposite directions."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Parameter(torch.randn(6, 4) / 2)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) + F.linear(x, self.tied)
        y: Tensor = self.down(hidden.tanh()) + hidden @ self.tied
        return y


def plan_one(*, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> PlannedAdapter:
    site = AdapterSite(name="w", shape=shape, dtype=dtype, transposed=transposed)
    return PlannedAdapter(site=site, form=SvdForm(), rank=2, scale=0.25, dtype=torch.float32)


def draw(adapter: PlannedAdapter) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in adapter.parameter_shapes.items()}


def test_folded_graph_computes_what_the_adapted_one_did(prepare: Prepare) -> None:
    module, x = Mixed().eval(), torch.randn(5, 4)
    bench = prepare(module, x)
    original = {name: p.detach().clone() for name, p in module.named_parameters()}
    before = bench.codes()
    (plain,) = bench.graph_module(x)
    bench.insert(bench.graph_module)
    bench.randomize()
    (adapted,) = bench.graph_module(x)
    assert not torch.allclose(adapted, plain)
    assert bench.fold(bench.graph_module).modified
    (folded,) = bench.graph_module(x)
    torch.testing.assert_close(folded, adapted, rtol=1e-5, atol=1e-5)
    assert bench.codes() == before
    assert not hasattr(bench.graph_module, "adapters")
    assert all(torch.equal(p, original[name]) for name, p in module.named_parameters())


def test_folding_zero_lambda_gives_back_the_weights_bit_for_bit(prepare: Prepare) -> None:
    module = Mixed()
    bench = prepare(module, torch.randn(5, 4))
    bench.insert(bench.graph_module)
    bench.fold(bench.graph_module)
    for name, parameter in module.named_parameters():
        assert torch.equal(bench.graph_module.get_parameter(f"module.{name}"), parameter)


def test_an_adapter_outside_the_plan_is_an_error(prepare: Prepare) -> None:
    bench = prepare(Mixed(), torch.randn(5, 4))
    bench.insert(bench.graph_module)
    # A plan without `up`, whose adapter stays in the graph and must not be reported as folded.
    shortened = AdapterPlan(adapters=tuple(a for a in bench.plan if a.site.name != "up.weight"))
    with pytest.raises(PostconditionError, match=r"up\.weight"):
        FoldAdaptersPass(plan=shortened)(bench.graph_module)


def test_regions_are_folded_too(prepare: Prepare) -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                blind = self.l(x)
            y: Tensor = self.l(x + blind)
            return y

    module, x = Region(), torch.randn(4, 3)
    bench = prepare(module, x)
    before = bench.codes()
    bench.insert(bench.graph_module)
    bench.randomize()
    (adapted,) = bench.graph_module(x)
    bench.fold(bench.graph_module)
    (folded,) = bench.graph_module(x)
    torch.testing.assert_close(folded, adapted, rtol=1e-5, atol=1e-5)
    assert bench.codes() == before


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_merge_adds_delta_in_the_layout_of_the_weight(transposed: bool) -> None:
    torch.manual_seed(0)
    adapter = plan_one(shape=(5, 3), dtype=torch.float32, transposed=transposed)
    weight, p = torch.randn(5, 3), draw(adapter)
    delta = 0.25 * p["P"].double() @ torch.diag(p["lam"].double()) @ p["Q"].double()
    merged = merge_weight(weight, adapter, p)
    exact = weight.double() + (delta.t() if transposed else delta)
    assert torch.equal(merged.weight, exact.float())
    assert merged.rounding_error == pytest.approx(float((exact.float().double() - exact).abs().max()), rel=1e-6)
    assert merged.site == "w"


def test_merge_flattens_kernels() -> None:
    torch.manual_seed(0)
    adapter = plan_one(shape=(5, 2, 3), dtype=torch.float32)
    weight, p = torch.randn(5, 2, 3), draw(adapter)
    delta = (0.25 * p["P"] @ torch.diag(p["lam"]) @ p["Q"]).reshape(5, 2, 3)
    torch.testing.assert_close(merge_weight(weight, adapter, p).weight, weight + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_casts_once_to_the_weights_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapter = plan_one(shape=(8, 8), dtype=dtype)
    weight, p = torch.randn(8, 8).to(dtype), draw(adapter)
    merged = merge_weight(weight, adapter, p)
    exact = weight.double() + 0.25 * p["P"].double() @ torch.diag(p["lam"].double()) @ p["Q"].double()
    assert merged.weight.dtype == dtype
    # correctly rounded: the error is at most half a unit in the last place
    assert merged.rounding_error <= float(exact.abs().max()) * torch.finfo(dtype).eps / 2
    assert not merged.weight.requires_grad


def test_an_adapter_that_the_graph_does_not_use_is_skipped(prepare: Prepare) -> None:
    bench = prepare(nn.Linear(3, 5), torch.randn(4, 3))
    (adapter,) = bench.plan
    unused = dataclasses.replace(adapter, site=dataclasses.replace(adapter.site, name="elsewhere.weight"))
    bench.insert(bench.graph_module)
    fold = FoldAdaptersPass(plan=AdapterPlan(adapters=(adapter, unused)))
    assert fold(bench.graph_module).modified
    assert bench.count_tagged() == 0


def test_embeddings_fold_back(prepare: Prepare) -> None:
    module, x = nn.Embedding(7, 3), torch.randint(0, 7, (4, 2))
    bench = prepare(module, x, selection=SiteSelection(sites=("weight",)))
    bench.insert(bench.graph_module)
    bench.randomize()
    (adapted,) = bench.graph_module(x)
    bench.fold(bench.graph_module)
    (folded,) = bench.graph_module(x)
    torch.testing.assert_close(folded, adapted, rtol=1e-5, atol=1e-6)


def test_merge_says_that_values_exceed_the_dtype() -> None:
    adapter = plan_one(shape=(5, 3), dtype=torch.float16)
    weight, p = torch.full((5, 3), 60000.0).half(), {name: torch.ones_like(one) for name, one in draw(adapter).items()}
    p["lam"] = p["lam"] * 1e5
    with pytest.raises(
        SiteError,
        match=r"site w: 15 of 15 values of W \+ ΔW exceed torch.float16, up to \d+, expected at most 65504; fold",
    ):
        merge_weight(weight, adapter, p)


def test_merge_keeps_infinities_that_a_weight_has_already() -> None:
    adapter = plan_one(shape=(5, 3), dtype=torch.float16)
    weight, p = torch.zeros(5, 3).half(), draw(adapter)
    weight[1, 2] = -torch.inf
    merged = merge_weight(weight, adapter, p).weight
    assert merged[1, 2] == -torch.inf
    assert int(merged.isfinite().sum()) == 14

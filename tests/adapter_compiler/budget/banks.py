"""Stores of adapters without a model, with flat memory or with each parameter's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adapter_compiler.budget.bank import TripletBank
from adapter_compiler.store import AdapterStore
from passes.forms import SvdForm
from passes.plan import AdapterPlan, PlannedAdapter
from passes.sites import AdapterSite


def make_plan(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64) -> AdapterPlan:
    """Adapters for weights of (out, in) with the given ranks, as far as they fit, named by position."""
    adapters = []
    for position, (out, fan_in, rank) in enumerate(shapes):
        site = AdapterSite(name=f"{position}.weight", shape=(out, fan_in), dtype=dtype)
        rank = min(rank, out, fan_in)
        adapters.append(PlannedAdapter(site=site, form=SvdForm(), rank=rank, scale=0.5, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))


def make_store(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64, *, flat: bool = True
) -> AdapterStore:
    """Their parameters, normal; every one has a gradient."""
    plan = make_plan(shapes, dtype)
    store = AdapterStore(plan, {adapter.site.name: torch.device("cpu") for adapter in plan})
    for parameter in store.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
        parameter.grad = torch.randn_like(parameter)
        if not flat:
            parameter.data = parameter.data.clone()
    assert (store.flat is not None) == flat
    return store


def make_bank(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64, *, flat: bool = True
) -> TripletBank:
    """The bank of such a store."""
    return TripletBank(make_store(shapes, dtype, flat=flat))


def find_triplets(bank: TripletBank) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
    """λ, P, Q of every site."""
    return [tuple(bank.parameters[site, name] for name in ("lam", "P", "Q")) for site in bank.sites]  # type: ignore[misc]

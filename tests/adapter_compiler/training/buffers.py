"""Training helpers: adapter parameters without a model, in flat buffers or with separate memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from passes.forms import SvdForm
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.site import AdapterSite


def make_plan(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64) -> AdapterPlan:
    """Adapters for weights of (out, in) with the given ranks, as far as they fit, named by position."""
    adapters = []
    for position, (out, fan_in, rank) in enumerate(shapes):
        site = AdapterSite(name=f"{position}.weight", shape=(out, fan_in), dtype=dtype)
        rank = min(rank, out, fan_in)
        adapters.append(PlannedAdapter(site=site, form=SvdForm(), rank=rank, scale=0.5, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))


def make_parameters(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64, *, flat: bool = True
) -> AdapterParameters:
    """Their parameters, normal; every one has a gradient."""
    plan = make_plan(shapes, dtype)
    adapter_parameters = AdapterParameters(plan, {adapter.site.name: torch.device("cpu") for adapter in plan})
    for parameter in adapter_parameters.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
        parameter.grad = torch.randn_like(parameter)
        if not flat:
            parameter.data = parameter.data.clone()
    assert (adapter_parameters.flat is not None) == flat
    return adapter_parameters


def make_buffers(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float64, *, flat: bool = True
) -> TripletBuffers:
    """The triplets of such parameters."""
    return TripletBuffers(make_parameters(shapes, dtype, flat=flat))


def find_triplets(triplets: TripletBuffers) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
    """λ, P, Q of every site."""
    return [tuple(triplets.parameters[site, name] for name in ("lam", "P", "Q")) for site in triplets.sites]  # type: ignore[misc]

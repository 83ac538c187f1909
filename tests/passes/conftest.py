"""Shared by the tests of passes: capture a module, plan adapters for it, print its graph."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from passes.adapt.fold_adapters import FoldAdaptersPass
from passes.adapt.insert_adapters import InsertAdaptersPass
from passes.analysis.weight_uses import find_parameter_aliases, find_weight_uses
from passes.base import find_graph_modules
from passes.capture.calls import split_call
from passes.capture.capture import CapturedGraph, capture_call
from passes.forms import find_form
from passes.planning.find_sites import SiteSearch, find_sites
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.selection import SiteSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workbench:
    """A captured module, and everything that passes need to adapt it."""

    module: nn.Module
    captured: CapturedGraph
    search: SiteSearch
    plan: AdapterPlan
    adapters: nn.Module

    @property
    def graph_module(self) -> GraphModule:
        return self.captured.graph_module

    @property
    def insert(self) -> InsertAdaptersPass:
        return InsertAdaptersPass(plan=self.plan, aliases=find_parameter_aliases(self.module))

    @property
    def fold(self) -> FoldAdaptersPass:
        return FoldAdaptersPass(plan=self.plan)

    def randomize(self) -> None:
        """Give the adapters random parameters, so that ΔW is not zero."""
        with torch.no_grad():
            for parameter in self.adapters.parameters():
                parameter.normal_()

    def codes(self) -> list[str]:
        """The code of the graph and of each region in it."""
        return [body.code for body in find_graph_modules(self.graph_module)]

    def print(self) -> str:
        """The code of the graph and its regions, without statements that free memory, and with short operator names."""
        text = "\n".join(self.codes())
        text = re.sub(r";  \w[\w = ]*= None", "", text).replace("torch.ops.", "")
        lines = [line.strip() for line in text.splitlines()]
        return "\n".join(line for line in lines if line)

    def count_tagged(self) -> int:
        nodes = [node for body in find_graph_modules(self.graph_module) for node in body.graph.nodes]
        return sum("adapter_site" in node.meta for node in nodes)

    def count_nodes(self) -> int:
        return sum(len(body.graph.nodes) for body in find_graph_modules(self.graph_module))


def _make_parameters(plan: AdapterPlan) -> nn.Module:
    """A module with the plan's parameters as ``<weight's name>.<parameter>``: λ and B are zero, the others normal."""
    root = nn.Module()
    for adapter in plan:
        owner = root
        for part in adapter.site.name.split("."):
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        for name, shape in adapter.parameter_shapes.items():
            is_zero = name in ("lam", "B")
            values = torch.zeros(shape, dtype=adapter.dtype) if is_zero else torch.randn(shape).to(adapter.dtype)
            owner.register_parameter(name, nn.Parameter(values, requires_grad=name not in adapter.form.frozen))
    return root


def _prepare(
    module: nn.Module,
    *args: Any,
    selection: SiteSelection | None = None,
    rank: int = 2,
    dtype: torch.dtype | None = None,
    form: str = "svd",
) -> Workbench:
    captured = capture_call(module, split_call(args, {}))
    uses = find_weight_uses(captured.graph_module, find_parameter_aliases(module))
    search = find_sites(uses, module, selection or SiteSelection())
    plan = AdapterPlan(
        adapters=tuple(
            PlannedAdapter(
                site=site,
                form=find_form(form),
                rank=min(rank, site.largest_rank),
                scale=0.5,
                dtype=dtype or site.dtype,
            )
            for site in search.sites
        )
    )
    adapters = _make_parameters(plan)
    captured.graph_module.add_module("adapters", adapters)
    return Workbench(module=module, captured=captured, search=search, plan=plan, adapters=adapters)


@pytest.fixture
def prepare() -> Callable[..., Workbench]:
    """``prepare(module, *args, selection=, rank=, dtype=, form=)`` returns a :class:`Workbench`."""
    torch.manual_seed(0)
    return _prepare

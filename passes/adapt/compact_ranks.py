"""Remove pruned triplets: fewer columns of P, λ and rows of Q, and no nodes where nothing is left.

    P [.., d1, r], λ [.., r], Q [.., r, d2], kept i1 < … < ik   →   P[.., i], λ[.., i], Q[.., i, :]
    a site that keeps nothing                                   →   rank 0: y + form(x) becomes y again

With λ = 0 at every removed triplet the outputs are the same within rounding, because the scale s does not
depend on the rank. Refused: an index that a site does not have, and graphs in which adapters are fused
(plan with :func:`compact_plan` and insert anew instead).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import GraphModule

from passes.adapt.fold_adapters import remove_adapter_nodes
from passes.adapt.insert_adapters import PARAMETERS_PREFIX, find_adapted_sites
from passes.base import GraphPass, PassResult, SiteError, find_graph_modules
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: By site, which of its triplets stay: indices [k], ascending.
Kept = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactRanksPass(GraphPass):
    """Shrink the adapters of an adapted graph.

    Contract: outputs are those of the graph before within rounding if λ is 0 at the removed triplets; the
    parameters have the shapes of ``compact_plan(plan, kept)``; sites with rank 0 have no node. The
    graph module's own parameters are replaced, those of other holders stay.

    Attributes:
        plan: the adapters as they are.
        kept: what stays; sites that are not named stay whole.
    """

    plan: AdapterPlan
    kept: Kept

    def call(self, graph_module: GraphModule) -> PassResult:
        """Slice the parameters, then take out the nodes of empty sites."""
        present = find_adapted_sites(graph_module)
        changed = [
            (old, new)
            for old, new in zip(self.plan, compact_plan(self.plan, self.kept), strict=True)
            if old.rank != new.rank and old.site.name in present
        ]
        for old, _ in changed:
            self._slice_parameters(graph_module, old)
        empty = {new.site.name for _, new in changed if new.is_empty}
        for body in find_graph_modules(graph_module) if empty else ():
            remove_adapter_nodes(body, empty)
        return PassResult(graph_module=graph_module, modified=bool(changed))

    def _slice_parameters(self, graph_module: GraphModule, adapter: PlannedAdapter) -> None:
        owner = graph_module.get_submodule(f"{PARAMETERS_PREFIX}{adapter.site.name}")
        for name, dimension in find_rank_dimensions(adapter).items():
            parameter = owner.get_parameter(name)
            sliced = parameter.detach().index_select(dimension, self.kept[adapter.site.name].to(parameter.device))
            setattr(owner, name, nn.Parameter(sliced, requires_grad=parameter.requires_grad))


def compact_plan(plan: AdapterPlan, kept: Kept) -> AdapterPlan:
    """The plan with the ranks that ``kept`` leaves; the scales stay.

    Raises:
        SiteError: an index is out of order or not one of the site's, or a site is not in the plan.
    """
    if unknown := sorted(kept.keys() - {adapter.site.name for adapter in plan}):
        raise SiteError(f"no adapter is planned for {', '.join(unknown)}; expected sites of the plan")
    adapters = []
    for adapter in plan:
        indices = kept.get(adapter.site.name)
        if indices is not None:
            _assert_indices(adapter, indices.tolist())
            adapter = dataclasses.replace(adapter, rank=len(indices))
        adapters.append(adapter)
    return AdapterPlan(adapters=tuple(adapters))


def find_rank_dimensions(adapter: PlannedAdapter) -> dict[str, int]:
    """By parameter, the dimension (counted from the end) along which its triplets stand; others are left out."""
    site = adapter.site
    one, two = (adapter.form.parameter_shapes(site.out_features, site.in_features, rank) for rank in (1, 2))
    found = {}
    for name, shape in one.items():
        differing = [i - len(shape) for i, size in enumerate(shape) if size != two[name][i]]
        if differing:
            found[name] = differing[0]
    return found


def _assert_indices(adapter: PlannedAdapter, indices: list[int]) -> None:
    if indices != sorted(set(indices)) or any(not 0 <= i < adapter.rank for i in indices):
        raise SiteError(
            f"site {adapter.site.name}: cannot keep triplets {indices}; expected ascending indices below {adapter.rank}"
        )

"""Merge each ΔW into its weight and remove all adapter nodes.

    y + form(x)  with weight W        →   y  with weight W + ΔW
    op(W + ΔW)   with weight W        →   op(W)  with weight W + ΔW

ΔW and the sum are computed in float64 (float32 if the device has no float64) and cast once to the weight's dtype. The
parameters of the graph module are replaced, not overwritten, so the captured module keeps its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.adapt.insert_adapters import PARAMETERS_PREFIX, find_adapted_sites
from passes.base import GraphPass, PassResult, SiteError, find_graph_modules
from passes.capture.capture import MODULE_PREFIX
from passes.planning.plan import AdapterPlan, PlannedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedWeight:
    """A weight with its ΔW folded in.

    Attributes:
        site: the weight's name.
        weight: the adapted weight in the weight's own dtype and layout.
        rounding_error: largest |cast - exact| over the elements.
    """

    site: str
    weight: torch.Tensor
    rounding_error: float


def merge_weight(weight: torch.Tensor, adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]) -> MergedWeight:
    """W' = W + ΔW, rescaled if the form rescales, computed in float64 if the device has it and cast once.

    Args:
        weight: the frozen weight W, of the site's shape.
        adapter: its adapter.
        parameters: the adapter's parameters by name.

    Raises:
        SiteError: the weight or the adapter is on the meta device, or W' exceeds the range of the weight's dtype.
    """
    if any(tensor.is_meta for tensor in (weight, *parameters.values())):
        raise SiteError(
            f"site {adapter.site.name} is on the meta device, which holds no values; expected a weight and an adapter "
            "with values; load them before folding"
        )
    if adapter.site.rows is not None:
        return _merge_into_rows(weight, adapter, parameters)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    with torch.no_grad():
        values = {k: v.detach().to(wide) for k, v in parameters.items()}
        exact = adapter.add_to(weight.detach(), values, dtype=wide)
        merged = exact.to(weight.dtype, copy=True)
        error = float(exact.sub_(merged).abs_().max()) if merged.numel() else 0.0
        if not math.isfinite(error):
            _assert_in_range(adapter.site.name, adapter.add_to(weight.detach(), values, dtype=wide), merged)
    return MergedWeight(site=adapter.site.name, weight=merged, rounding_error=error)


def _assert_in_range(site: str, exact: torch.Tensor, merged: torch.Tensor) -> None:
    """Raise :class:`SiteError` if finite values are inf or nan after the cast."""
    overflows = exact.isfinite() & ~merged.isfinite()
    if bool(overflows.any()):
        raise SiteError(
            f"site {site}: {int(overflows.sum())} of {exact.numel()} values of W + ΔW exceed {merged.dtype}, up to "
            f"{float(exact[overflows].abs().max()):.6g}, expected at most {torch.finfo(merged.dtype).max:.6g}; fold in "
            "a wider dtype, as that of a model after model.float()"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldAdaptersPass(GraphPass):
    """Fold the adapters of ``plan`` into the weights of a graph.

    Contract: afterwards no node is tagged, the graph module has no adapter parameters, and the outputs are those of
    the adapted graph within rounding. Folding undoes :class:`~passes.adapt.insert_adapters.InsertAdaptersPass`: the
    nodes are those of the graph before insertion.

    Attributes:
        plan: all adapters of the graph.
    """

    plan: AdapterPlan

    def call(self, graph_module: GraphModule) -> PassResult:
        """Merge the weights, then remove the nodes."""
        present = find_adapted_sites(graph_module)
        folded = [adapter for adapter in self.plan if adapter.site.name in present]
        used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        for adapter in folded:
            _replace_weight(graph_module, adapter, used)
        sites = {adapter.site.name for adapter in folded}
        for body in find_graph_modules(graph_module):
            remove_adapter_nodes(body, sites)
        if present == sites and hasattr(graph_module, PARAMETERS_PREFIX.rstrip(".")):
            delattr(graph_module, PARAMETERS_PREFIX.rstrip("."))
        return PassResult(graph_module=graph_module, modified=bool(folded))

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise an error unless every graph lints and no adapter node is left."""
        super().ensures(graph_module)
        if left := find_adapted_sites(graph_module):
            raise ValueError(f"adapter nodes are left at {', '.join(sorted(left))}; they are not in the plan")


def _replace_weight(graph_module: GraphModule, adapter: PlannedAdapter, used: Set[str]) -> None:
    names = adapter.parameter_shapes
    parameters = {name: _parameter(graph_module, adapter, name) for name in names}
    targets = [MODULE_PREFIX + name for name in (adapter.site.weight, *adapter.site.aliases)]
    targets = [target for target in targets if target in used]
    merged = merge_weight(graph_module.get_parameter(targets[0]), adapter, parameters)
    replacement = nn.Parameter(merged.weight, requires_grad=False)
    for target in targets:
        owner, _, leaf = target.rpartition(".")
        setattr(graph_module.get_submodule(owner), leaf, replacement)


def _merge_into_rows(
    weight: torch.Tensor, adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]
) -> MergedWeight:
    """The weight with the sum in the rows that the adapter covers; the other rows stay the same bit for bit."""
    merged = weight.detach().clone(memory_format=torch.contiguous_format)
    rows = adapter.site.to_matrix(merged)
    site = dataclasses.replace(adapter.site, shape=tuple(rows.shape), transposed=False, op="linear", rows=None)
    part = merge_weight(rows, dataclasses.replace(adapter, site=site), parameters)
    rows.copy_(part.weight)
    return MergedWeight(site=adapter.site.name, weight=merged, rounding_error=part.rounding_error)


def _parameter(graph_module: GraphModule, adapter: PlannedAdapter, name: str) -> torch.Tensor:
    return graph_module.get_parameter(f"{PARAMETERS_PREFIX}{adapter.site.name}.{name}")


def remove_adapter_nodes(graph_module: GraphModule, sites: Set[str]) -> None:
    """Remove the nodes of these sites' adapters from one graph; users read the base values again."""
    tagged = [node for node in graph_module.graph.nodes if _is_tagged(node, sites)]
    for node in tagged:
        if "adapter_replaces" in node.meta:
            node.replace_all_uses_with(node.args[0])
    for region in {user for node in tagged for user in node.users if "adapter_site" not in user.meta}:
        region.args = tuple(arg for arg in region.args if not _is_tagged(arg, sites))
    for node in reversed(tagged):
        graph_module.graph.erase_node(node)


def _is_tagged(value: object, sites: Set[str]) -> bool:
    return isinstance(value, Node) and value.meta.get("adapter_site") in sites

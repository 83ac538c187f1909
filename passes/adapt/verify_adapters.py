"""Check the invariants of an adapted graph that no other pass checks."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule

from passes.adapt.insert_adapters import PARAMETERS_PREFIX, find_adapted_sites
from passes.base import GraphPass, PassResult, PostconditionError, find_graph_modules
from passes.planning.plan import AdapterPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyAdaptersPass(GraphPass):
    """Raises an error if the adapted graph breaks an invariant; changes nothing.

    Checked: only sites of the plan are tagged; every adapter parameter requires grad, except the starting values
    that some forms keep; the result of every insertion is used.

    Attributes:
        plan: all adapters of the graph.
    """

    plan: AdapterPlan

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the checks.

        Raises:
            PostconditionError: one of them fails; the message names the site or the parameter.
        """
        present = find_adapted_sites(graph_module)
        if unplanned := present - {adapter.site.name for adapter in self.plan}:
            raise PostconditionError(f"sites {', '.join(sorted(unplanned))} are adapted but not planned")
        for adapter in (adapter for adapter in self.plan if adapter.site.name in present):
            for name in adapter.parameter_shapes:
                target = f"{PARAMETERS_PREFIX}{adapter.site.name}.{name}"
                is_frozen = name in adapter.form.frozen
                if graph_module.get_parameter(target).requires_grad == is_frozen:
                    reason = "requires grad, but must not train" if is_frozen else "does not require grad"
                    raise PostconditionError(f"{target} {reason}; do not change requires_grad of adapters")
        for body in find_graph_modules(graph_module):
            _assert_insertions_are_read(body)
        return PassResult(graph_module=graph_module, modified=False)


def _assert_insertions_are_read(body: GraphModule) -> None:
    for node in body.graph.nodes:
        if "adapter_replaces" in node.meta and not node.users:
            raise PostconditionError(f"site {node.meta['adapter_site']}: the adapted value {node.name} is never read")

"""Insert the planned adapters into a graph as nodes.

For each weight of the plan that the graph uses:

    y = x Wᵀ  (linear, matmul, mm, addmm on the whole weight)   →   y + form(x)
    y = x Wₑ  for each e of a stack (bmm, matmul)                →   y + form(x)
    y = W[x]  (embedding), y = x ∗ W (ungrouped convolution)    →   y + form(x)
    any other use, or any use of a part of W                     →   W + ΔW in place of W

One use of the last kind makes the adapter run on the weight for all uses of that weight in the graph. The update of an
adapter for some rows of W is padded with zeros. Forms that rescale the rows of the sum, W' = c ∘ (W + ΔW), compute c
once per weight and graph:

    y = x Wᵀ + b                                                 →   y + (c - 1) ∘ (y - b) + c ∘ form(x)

Parameters are passed into the bodies of ``no_grad`` and autocast regions as additional operands. Refused: a plan whose
parameters are not in the graph module, and weights whose shape differs from the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from passes.adapt.emit_rescaled import emit_factor, emit_matrix, emit_rescaled
from passes.adapt.emit_updates import AdaptedUse, emit_update, find_padding, fits_activations
from passes.analysis.weight_uses import GraphUse, find_body_reference, find_weight_uses
from passes.base import GraphPass, PassResult, PreconditionError, find_graph_modules
from passes.capture.capture import MODULE_PREFIX
from passes.forms.base import NodeEmitter
from passes.planning.plan import AdapterPlan, PlannedAdapter

aten = torch.ops.aten

#: Prefix of the adapters' parameters in a graph module: ``adapters.<site>.<parameter>``.
PARAMETERS_PREFIX = "adapters."


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsertAdaptersPass(GraphPass):
    """Insert the adapters of ``plan`` into a captured graph.

    Contract: where ΔW = 0 the outputs stay the same bit for bit. Every node that the pass adds has
    ``meta["adapter_site"]``; the last one of each insertion also has ``meta["adapter_replaces"]``, the name of the
    node whose value it replaces. Nothing is inserted at sites that already have their adapter, and for adapters that
    change nothing.

    Attributes:
        plan: which weight gets which adapter.
        aliases: every parameter name → the first name of the same Parameter.
    """

    plan: AdapterPlan
    aliases: Mapping[str, str]

    def requires(self, graph_module: GraphModule) -> None:
        """Raise an error unless the graph lints and has the plan's weights and parameters in the planned shapes.

        Raises:
            PreconditionError: a weight or a parameter is missing or has another shape.
            SiteError: an update depends on the call (a mixture, a mask), which a graph of nodes does not have.
        """
        super().requires(graph_module)
        for adapter in self.plan:
            adapter.assert_matrix()
        used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        targets: dict[str, list[str]] = {}
        for name, first in self.aliases.items():
            targets.setdefault(first, []).append(MODULE_PREFIX + name)
        for adapter in self.plan:
            for target in (target for target in targets.get(adapter.site.weight, []) if target in used):
                _assert_shape(graph_module, target, adapter.site.shape, adapter)
                for name, shape in adapter.parameter_shapes.items():
                    _assert_shape(graph_module, _parameter_target(adapter, name), shape, adapter)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Insert each adapter that is not in the graph yet."""
        present = find_adapted_sites(graph_module)
        uses = find_weight_uses(graph_module, self.aliases)
        wanted = [a for a in self.plan if uses.get(a.site.weight) and a.site.name not in present and not a.is_empty]
        for adapter in wanted:
            _insert(graph_module, adapter, uses[adapter.site.weight])
        return PassResult(graph_module=graph_module, modified=bool(wanted))

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise an error unless every graph lints and every planned weight that the graph uses has its adapter."""
        super().ensures(graph_module)
        used = {name for name, found in find_weight_uses(graph_module, self.aliases).items() if found}
        wanted = {a.site.name for a in self.plan if not a.is_empty and a.site.weight in used}
        missing = wanted - find_adapted_sites(graph_module)
        if missing:
            raise ValueError(f"no adapter was inserted at {', '.join(sorted(missing))}")


def find_adapted_sites(graph_module: GraphModule) -> set[str]:
    """Names of the sites whose adapters are in the graph."""
    bodies = find_graph_modules(graph_module)
    tags = (node.meta.get("adapter_site") for body in bodies for node in body.graph.nodes)
    return {str(tag) for tag in tags if tag is not None}


def _insert(graph_module: GraphModule, adapter: PlannedAdapter, uses: Sequence[GraphUse]) -> None:
    parameters = _fetch_parameters(graph_module, adapter)
    if all(_fits_activations(use, adapter) for use in uses):
        factors: dict[Node, Node] = {}
        for use in uses:
            if adapter.form.rescales and use.source not in factors:
                last = max([use.source, *parameters.values()])
                emitter = NodeEmitter(after=last, site=adapter.site.name)
                factors[use.source] = emit_factor(emitter, use.source, adapter, parameters)
            _insert_on_activations(use, adapter, parameters, factors.get(use.source))
    else:
        for source in dict.fromkeys(use.source for use in uses):
            _insert_on_weight(source, adapter, parameters)


def _fits_activations(use: GraphUse, adapter: PlannedAdapter) -> bool:
    """Whether an adapter can run on the activations that the use reads."""
    return use.activation is not None and fits_activations(use.kind, adapter, reverse=is_reversed(use, adapter))


def is_reversed(use: GraphUse, adapter: PlannedAdapter) -> bool:
    """Whether a product has the opposite direction to the site's, or a product of a stack is x Wₑ."""
    return use.transposed if use.kind == "stack" else use.transposed != adapter.site.transposed


def _fetch_parameters(graph_module: GraphModule, adapter: PlannedAdapter) -> dict[str, Node]:
    """``get_attr`` nodes for the adapter's parameters, at the start of the outermost graph."""
    graph = graph_module.graph
    fetched: dict[str, Node] = {}
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for name in adapter.parameter_shapes:
        with graph.inserting_before(anchor):
            node = graph.get_attr(_parameter_target(adapter, name))
        node.meta["adapter_site"] = adapter.site.name
        fetched[name] = node
    return fetched


def _insert_on_activations(
    use: GraphUse, adapter: PlannedAdapter, parameters: Mapping[str, Node], factor: Node | None
) -> None:
    inner = {name: _bring_into(use.regions, node, adapter) for name, node in parameters.items()}
    if factor is not None:
        factor = _bring_into(use.regions, factor, adapter)
    assert use.activation is not None
    product = AdaptedUse(
        kind=use.kind, call=use.node, x=use.activation, output=use.node, reverse=is_reversed(use, adapter)
    )
    emitter = NodeEmitter(after=use.node, site=adapter.site.name)
    update = emit_update(emitter, product, adapter, inner, factor)
    _substitute(emitter, use.node, update)


def _insert_on_weight(source: Node, adapter: PlannedAdapter, parameters: Mapping[str, Node]) -> None:
    last = max([source, *parameters.values()])
    emitter = NodeEmitter(after=last, site=adapter.site.name)
    update = adapter.form.emit_weight(emitter, parameters, adapter.scale)
    if adapter.form.rescales:
        matrix = emit_matrix(emitter, source, adapter)
        factor = adapter.form.emit_factor(emitter, matrix, parameters, adapter.scale)
        update = emit_rescaled(emitter, matrix, update, emitter.emit(aten.unsqueeze.default, factor, 1))
    if adapter.site.rows is not None:
        update = emitter.emit(aten.constant_pad_nd.default, update, [0, 0, *find_padding(adapter.site)])
    if adapter.site.transposed:
        update = emitter.emit(aten.t.default, update)
    if len(adapter.site.shape) != 2:
        update = emitter.emit(aten.reshape.default, update, list(adapter.site.shape))
    if adapter.site.dtype != adapter.dtype:
        update = emitter.emit(aten.type_as.default, update, source)
    _substitute(emitter, source, update)


def _substitute(emitter: NodeEmitter, node: Node, update: Node) -> None:
    """Replace ``node`` by ``node + update`` in all its users, those in other adapters included."""
    total = emitter.emit(aten.add.Tensor, node, update)
    total.meta["adapter_replaces"] = node.name
    if "val" in node.meta:
        total.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emitter.emitted)


def _bring_into(regions: Sequence[Node], value: Node, adapter: PlannedAdapter) -> Node:
    """The placeholder of ``value`` inside nested regions, to each of which it is passed as an additional operand."""
    for region in regions:
        owner = region.graph.owning_module
        assert owner is not None
        body = owner.get_submodule(str(find_body_reference(region).target))
        assert isinstance(body, GraphModule)
        operands = region.args[region.args.index(find_body_reference(region)) + 1 :]
        placeholders = body.graph.find_nodes(op="placeholder")
        if value in operands:
            value = placeholders[operands.index(value)]
            continue
        region.args = (*region.args, value)
        with body.graph.inserting_after(placeholders[-1]):
            inner = body.graph.placeholder(value.name)
        inner.meta["adapter_site"] = adapter.site.name
        value = inner
    return value


def _parameter_target(adapter: PlannedAdapter, name: str) -> str:
    return f"{PARAMETERS_PREFIX}{adapter.site.name}.{name}"


def _assert_shape(graph_module: GraphModule, target: str, shape: tuple[int, ...], adapter: PlannedAdapter) -> None:
    try:
        found = tuple(graph_module.get_parameter(target).shape)
    except AttributeError as error:
        raise PreconditionError(f"site {adapter.site.name}: the graph module has no parameter {target}") from error
    if found != shape:
        raise PreconditionError(
            f"site {adapter.site.name}: {target} has shape {found}, the plan expects {shape}; plan again for this model"
        )

"""Find the heads of a model: the last weights before an output, and the layer in front of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch.fx import Graph, Node

from passes.analysis.provenance import OriginTrace


def find_heads(
    graph: Graph, trace: OriginTrace, is_product: Callable[[Node], bool], fixed: Collection[Node]
) -> set[Node]:
    """Operators behind which no weight follows and whose result is not added to a residual.

    A product in front of a head, with a non-linearity between and the result of residual blocks before it,
    belongs to the head, as BERT's pooler does.

    Args:
        graph: the graph of a whole model, or of its last part.
        trace: the origins in it.
        is_product: whether an operator is a matrix product with a weight.
        fixed: operators whose role is certain.
    """
    followed = _find_followed(graph, trace)
    weighted = {node for node, kind in trace.kinds.items() if kind == "weighted" and is_product(node)}
    heads = {n for n in weighted if n not in fixed and n not in followed and not _is_residual(n, trace)}
    front = {
        origin.node
        for head in heads
        for origin in trace.inputs(head)
        if origin.is_nonlinear and origin.node in weighted and origin.node not in fixed
        if all(trace.kinds[before.node] in ("sum", "product", "mixture") for before in trace.inputs(origin.node))
    }
    return heads | {node for node in front if not _is_residual(node, trace)}


def _find_followed(graph: Graph, trace: OriginTrace) -> set[Node]:
    """Nodes on whose value a later operator with a weight depends."""
    followed: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(user in followed or trace.kinds.get(user) == "weighted" for user in node.users):
            followed.add(node)
    return followed


def _is_residual(node: Node, trace: OriginTrace) -> bool:
    """Whether the result is added to that of another operator, scalars such as losses apart."""
    for sink in trace.sinks.get(node, []):
        if trace.kinds[sink.node] == "sum" and sink.node.meta["val"].dim() > 0:
            others = {trace.kinds[o.node] for o in trace.inputs(sink.node) if o.node is not node}
            if others - {"input"}:
                return True
    return False

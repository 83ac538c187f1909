"""Find the heads of a model: the last products with weights before an output, and the layer before them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch.fx import Graph, Node

from passes.analysis.provenance import ProvenanceTrace


def find_heads(
    graph: Graph, trace: ProvenanceTrace, is_product: Callable[[Node], bool], fixed: Collection[Node]
) -> set[Node]:
    """Products after which no other weight is used and whose result is not added to a residual stream.

    A product directly before a head, followed by a non-linearity and reading the result of residual blocks, belongs to
    the head, as in BERT's pooler.

    Args:
        graph: the graph of a whole model, or of its last part.
        trace: the provenance in it.
        is_product: whether an operator is a matrix product with a weight.
        fixed: operators whose role is certain.
    """
    followed = _find_followed(graph, trace)
    weighted = {node for node, kind in trace.kinds.items() if kind == "weighted" and is_product(node)}
    heads = {n for n in weighted if n not in fixed and n not in followed and not _is_residual(n, trace)}
    front = {
        source.node
        for head in heads
        for source in trace.inputs(head)
        if source.is_nonlinear and source.node in weighted and source.node not in fixed
        if all(trace.kinds[before.node] in ("sum", "product", "mixture") for before in trace.inputs(source.node))
    }
    return heads | {node for node in front if not _is_residual(node, trace)}


def _find_followed(graph: Graph, trace: ProvenanceTrace) -> set[Node]:
    """Nodes whose value a later operator with a weight depends on."""
    followed: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(user in followed or trace.kinds.get(user) == "weighted" for user in node.users):
            followed.add(node)
    return followed


def _is_residual(node: Node, trace: ProvenanceTrace) -> bool:
    """Whether the result is added to that of another operator; sums of scalars, such as losses, do not count."""
    for sink in trace.sinks.get(node, []):
        if trace.kinds[sink.node] == "sum" and sink.node.meta["val"].dim() > 0:
            others = {trace.kinds[o.node] for o in trace.inputs(sink.node) if o.node is not node}
            if others - {"input"}:
                return True
    return False

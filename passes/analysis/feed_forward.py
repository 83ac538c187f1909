"""Find feed-forward networks in a graph: two products with a non-linearity or a gate between them.

    down(act(up(x)))                    as in BERT and GPT
    down(act(gate(x)) ∘ up(x))          as in Llama

The gate and up may also be two parts of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch.fx import Node

from passes.analysis.dataflow import operator_name
from passes.analysis.provenance import ProvenanceTrace


def find_feed_forward_roles(
    trace: ProvenanceTrace, is_product: Callable[[Node], bool], taken: Collection[Node]
) -> dict[Node, str]:
    """The role of each operator of a feed-forward network: ``gate``, ``up``, ``gate_up`` or ``down``.

    Args:
        trace: the provenance in the graph.
        is_product: whether an operator is a matrix product with a weight.
        taken: operators that have another role already.
    """
    roles: dict[Node, str] = {}
    gates: set[Node] = set()
    for node in (node for node, kind in trace.kinds.items() if kind == "gate"):
        branches = _name_branches(node, trace)
        if branches and all(is_product(branch) and branch not in taken for branch in branches):
            gates.add(node)
            roles |= branches
    for node, kind in trace.kinds.items():
        if kind == "weighted" and is_product(node) and node not in taken:
            read = trace.inputs(node)
            ups = {source.node for source in read if source.is_nonlinear}
            if any(source.node in gates for source in read):
                roles.setdefault(node, "down")
            elif len(read) == 1 and ups and all(_is_up(up, trace, is_product) and up not in taken for up in ups):
                roles.setdefault(node, "down")
                roles |= {up: "up" for up in ups if up not in roles}
    return roles


def _name_branches(gate: Node, trace: ProvenanceTrace) -> dict[Node, str]:
    read = trace.inputs(gate)
    if len({source.node for source in read}) == 1:
        return {read[0].node: "gate_up"}
    nonlinear = {source.node for source in read if source.is_nonlinear}
    linear = {source.node for source in read if not source.is_nonlinear}
    if not nonlinear or not linear or nonlinear & linear or operator_name(gate) == "glu":
        return {}
    return {**dict.fromkeys(nonlinear, "gate"), **dict.fromkeys(linear, "up")}


def _is_up(node: Node, trace: ProvenanceTrace, is_product: Callable[[Node], bool]) -> bool:
    """Whether it is a product whose result is used only through a non-linearity."""
    sinks = [sink for sink in trace.sinks.get(node, []) if sink.node.op != "output"]
    return trace.kinds[node] == "weighted" and is_product(node) and all(s.source.is_nonlinear for s in sinks)

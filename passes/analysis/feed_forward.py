"""Find feed-forward networks in a graph: two products with a non-linearity between them, or a gate.

down(act(up(x)))                    as in BERT and GPT
down(act(gate(x)) ∘ up(x))          as in Llama; gate and up may be two parts of one product
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch.fx import Node

from passes.analysis.dataflow import operator_name
from passes.analysis.provenance import OriginTrace


def find_feed_forward_roles(
    trace: OriginTrace, is_product: Callable[[Node], bool], taken: Collection[Node]
) -> dict[Node, str]:
    """``gate``, ``up``, ``gate_up`` or ``down`` for operators with a weight.

    Args:
        trace: the origins in the graph.
        is_product: whether an operator is a matrix product with a weight.
        taken: operators that have a role already; they are no part of a feed-forward network.
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
            ups = {origin.node for origin in read if origin.is_nonlinear}
            if any(origin.node in gates for origin in read):
                roles.setdefault(node, "down")
            elif len(read) == 1 and ups and all(_is_up(up, trace, is_product) and up not in taken for up in ups):
                roles.setdefault(node, "down")
                roles |= {up: "up" for up in ups if up not in roles}
    return roles


def _name_branches(gate: Node, trace: OriginTrace) -> dict[Node, str]:
    read = trace.inputs(gate)
    if len({origin.node for origin in read}) == 1:
        return {read[0].node: "gate_up"}
    bent = {origin.node for origin in read if origin.is_nonlinear}
    straight = {origin.node for origin in read if not origin.is_nonlinear}
    if not bent or not straight or bent & straight or operator_name(gate) == "glu":
        return {}
    return {**dict.fromkeys(bent, "gate"), **dict.fromkeys(straight, "up")}


def _is_up(node: Node, trace: OriginTrace, is_product: Callable[[Node], bool]) -> bool:
    """Whether it is a product that is read through a non-linearity only."""
    sinks = [sink for sink in trace.sinks.get(node, []) if sink.node.op != "output"]
    return trace.kinds[node] == "weighted" and is_product(node) and all(s.origin.is_nonlinear for s in sinks)

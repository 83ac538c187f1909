"""The dataflow of an fx graph as a networkx DiGraph, and queries on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.fx import Graph, Node

from passes.compat import OpOverload, schema_of

if TYPE_CHECKING:  # networkx takes longer to import than the rest of this package
    import networkx as nx


def build_dataflow(graph: Graph) -> nx.DiGraph[Node]:
    """A DiGraph with one vertex per node and one edge per use of a value.

    A node that writes into its first argument in place has an edge back to that argument, and to what the argument is
    a view of, because later users read the written values.
    """
    import networkx as nx

    flow: nx.DiGraph[Node] = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        for source in node.all_input_nodes:
            flow.add_edge(source, node)
        if is_in_place(node):
            flow.add_edges_from((node, written) for written in _find_written(node.args[0]))
    return flow


def _find_written(value: object) -> Iterator[Node]:
    """The value that is written into, and the values that it is a view of."""
    while isinstance(value, Node):
        yield value
        value = value.args[0] if _shares_memory(value) and value.args else None


def _shares_memory(node: Node) -> bool:
    """Whether the result is a view of the first argument, or the argument itself after a write."""
    if not isinstance(node.target, OpOverload):
        return False
    return any(result.alias_info is not None for result in schema_of(node.target).returns)


def is_in_place(node: Node) -> bool:
    """Whether the node writes into its first argument."""
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable and bool(node.args)


def operator_name(node: Node) -> str:
    """``linear`` for ``aten.linear.default``."""
    if isinstance(node.target, OpOverload):
        return str(schema_of(node.target).name.split("::")[-1])
    return node.op if node.op == "output" else str(getattr(node.target, "__name__", node.target))


def find_nodes_reaching_output(graph: Graph) -> set[Node]:
    """Every node that an output of the graph depends on, or an in-place change of an input, a buffer or a parameter."""
    import networkx as nx

    reversed_flow = build_dataflow(graph).reverse(copy=False)
    sinks = [graph.output_node()]
    sinks += [node for node in graph.nodes if is_in_place(node) and _outlives_call(node.args[0])]
    layers = nx.bfs_layers(reversed_flow, sinks)
    return {node for layer in layers for node in layer}


def _outlives_call(value: object) -> bool:
    return isinstance(value, Node) and value.op in ("get_attr", "placeholder")

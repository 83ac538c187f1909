"""Recognize the tanh form of GELU where a model computes it step by step (``gelu_new`` in GPT-2 and related models).

    0.5 x (1 + tanh(c (x + k x³))), c ≈ √(2/π), k ≈ 0.044715    →    tanh_gelu(x, c, k)

This is the approximation of Hendrycks and Gimpel 2016, arXiv 1606.08415. Backward then needs one saved tensor instead
of seven, and the output is the same bit for bit. Not rewritten: other constants or another order of operators.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult, find_graph_modules
from passes.fuse.memory_efficient_ops import tanh_gelu

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecognizeGeluPass(GraphPass):
    """Replace the operators of the tanh form of GELU by one function.

    Contract: outputs stay the same bit for bit, gradients within rounding.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace it in the graph and in the regions inside it."""
        modified = False
        for body in find_graph_modules(graph_module):
            for node in list(body.graph.nodes):
                found = _find_arguments(node)
                if found is not None:
                    _replace(node, *found)
                    modified = True
        return PassResult(graph_module=graph_module, modified=modified)


def _replace(node: Node, x: Node, c: float, k: float) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        gelu = graph.call_function(tanh_gelu, (x, c, k))
    gelu.meta.update(node.meta)
    chain = list(_find_chain(node, x))
    node.replace_all_uses_with(gelu)
    for one in chain:
        if not one.users:
            graph.erase_node(one)


def _find_chain(node: Node, x: Node) -> Iterator[Node]:
    """The nodes from the result back to x, each one before its inputs."""
    yield node
    for source in node.all_input_nodes:
        if source is not x:
            yield from _find_chain(source, x)


def _find_arguments(node: Node) -> tuple[Node, float, float] | None:
    """x, c and k if the node is 0.5 x (1 + tanh(c (x + k x³)))."""
    if node.target is not aten.mul.Tensor:
        return None
    for half, rest in (node.args[:2], node.args[1::-1]):
        x, found = _match(half, aten.mul.Tensor, 0.5), _find_cubic(rest)
        if found is not None and found[0] is x:
            return found
    return None


def _find_cubic(node: object) -> tuple[Node, float, float] | None:
    """x, c and k if the node is 1 + tanh(c (x + k x³))."""
    tanh = _match(node, aten.add.Tensor, 1.0)
    if tanh is None or tanh.target is not aten.tanh.default:
        return None
    total = _match(tanh.args[0], aten.mul.Tensor, math.sqrt(2 / math.pi))
    if total is None or total.target is not aten.add.Tensor or len(total.args) != 2 or total.kwargs:
        return None
    x, cube = total.args
    power = _match(cube, aten.mul.Tensor, 0.044715)
    found = None if power is None else _match(power, aten.pow.Tensor_Scalar, 3.0)
    if found is not x or not isinstance(x, Node):
        return None
    return x, float(tanh.args[0].args[1]), float(cube.args[1])  # type: ignore[union-attr,arg-type]


def _match(node: object, target: object, constant: float) -> Node | None:
    """x if the node is ``target(x, constant)``."""
    if not isinstance(node, Node) or node.target is not target or len(node.args) != 2 or node.kwargs:
        return None
    x, value = node.args
    is_close = isinstance(value, (int, float)) and math.isclose(value, constant, rel_tol=1e-6)
    return x if isinstance(x, Node) and is_close else None

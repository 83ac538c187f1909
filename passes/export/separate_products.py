"""Write products with constant weights as MatMul(x, W) and Add, the form in which quantizers look for weights.

    MatMul(x, Transpose(W))        →   MatMul(x, W.t)
    Gemm(x, W, b; alpha = beta = 1) →   Add(MatMul(x, W or W.t), b)

where W.t is a new constant. A weight that is a graph input as well, so that callers may replace it, is left as it is,
and so is Gemm with other factors.
"""

from __future__ import annotations

import numpy
import onnx
from onnx import helper, numpy_helper

_TRANSPOSED = ".t"


def separate_products(model: onnx.ModelProto) -> dict[str, str]:
    """Rewrite the outermost graph in place, and name every node.

    Returns:
        By the name of each weight that was transposed, the name of what holds its values now.
    """
    graph = model.graph
    opened = {value.name for value in graph.input}
    weights = {t.name: t for t in graph.initializer if t.name not in opened and len(t.dims) == 2}
    given = {value.name for value in graph.output}
    moved: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights and _is_swap(node) and node.output[0] not in given:
            _add_transposed(graph, weights[node.input[0]], moved)
            _rename_uses(graph, node.output[0], moved[node.input[0]])
        elif node.op_type == "Gemm" and node.input[1] in weights and _is_plain(node):
            nodes += _split(graph, node, weights, moved)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread(graph, moved)
    _name_nodes(graph)
    return moved


def _is_swap(node: onnx.NodeProto) -> bool:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0]) == [1, 0]


def _is_plain(node: onnx.NodeProto) -> bool:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0 and not found.get("transA", 0)


def _split(
    graph: onnx.GraphProto, node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], moved: dict[str, str]
) -> list[onnx.NodeProto]:
    name = node.input[1]
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        _add_transposed(graph, weights[name], moved)
        name = moved[name]
    output = node.output[0]
    if len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [node.input[0], name], [output], name=f"{output}.product")]
    product = f"{output}.product"
    return [
        helper.make_node("MatMul", [node.input[0], name], [product], name=f"{product}.node"),
        helper.make_node("Add", [product, node.input[2]], [output], name=f"{output}.sum"),
    ]


def _add_transposed(graph: onnx.GraphProto, weight: onnx.TensorProto, moved: dict[str, str]) -> None:
    if weight.name in moved:
        return
    values = numpy.ascontiguousarray(numpy_helper.to_array(weight).T)
    moved[weight.name] = weight.name + _TRANSPOSED
    graph.initializer.append(numpy_helper.from_array(values, moved[weight.name]))


def _rename_uses(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def _drop_unread(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Remove the weights that only their transposes are read of."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    read |= {name for node in graph.node for a in node.attribute for inner in a.g.node for name in inner.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Quantizers choose nodes by name, so each needs one of its own."""
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}.{number}"
        seen.add(node.name)

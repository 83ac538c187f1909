"""Run all operators of one type in an ONNX graph in float32, with casts around them.

    y = Op(x)   with x, y in bfloat16, float16 or float64   →   y = Cast(Op(Cast(x, float32)), dtype)

Only the graph is edited, so weights need not be loaded: they are cast when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, helper

#: Dtypes that some CPU kernels of onnxruntime do not support.
CAST_DTYPES = frozenset({TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.DOUBLE})


def cast_operator(model: onnx.ModelProto, op_type: str) -> int:
    """Insert casts around every node of this type that has an input of one of :data:`CAST_DTYPES`.

    Args:
        model: edited in place; its weights need not be loaded.
        op_type: the operator, of the default domain.

    Returns:
        The number of nodes with new casts.
    """
    types = find_types(model)
    return sum(_cast_in_graph(graph, op_type, types) for graph in find_graphs(model.graph))


def find_composite_operators(model: onnx.ModelProto) -> list[str]:
    """Operators of the graph that ONNX defines by other operators; a runtime without a kernel expands these."""
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    present = {node.op_type for graph in find_graphs(model.graph) for node in graph.node if not node.domain}
    if version is None:
        return []
    schemas = [onnx.defs.get_schema(op_type, version, "") for op_type in sorted(present)]
    kinds = ("has_function", "has_context_dependent_function")
    return [schema.name for schema in schemas if any(getattr(schema, kind) for kind in kinds)]


def find_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, by name, as far as shape inference finds it."""
    inferred = onnx.shape_inference.infer_shapes(model)
    types: dict[str, int] = {}
    for graph in find_graphs(inferred.graph):
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type"):
                types[value.name] = value.type.tensor_type.elem_type
    return types


def find_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and, at any depth, the bodies of its loops and branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            bodies = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for body in bodies:
                yield from find_graphs(body)


def _cast_in_graph(graph: onnx.GraphProto, op_type: str, types: Mapping[str, int]) -> int:
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        dtype = next((types[name] for name in node.input if types.get(name) in CAST_DTYPES), None)
        if node.op_type == op_type and node.domain in ("", "ai.onnx") and dtype is not None:
            nodes += _wrap(node, types, dtype)
            count += 1
        else:
            nodes.append(node)
    if count:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return count


def _wrap(node: onnx.NodeProto, types: Mapping[str, int], dtype: int) -> list[onnx.NodeProto]:
    wrapped = onnx.NodeProto.FromString(node.SerializeToString())
    tag = node.output[0]
    before, after = [], []
    for position, name in enumerate(node.input):
        if types.get(name) in CAST_DTYPES:
            wrapped.input[position] = f"{tag}.input_{position}.float32"
            before.append(helper.make_node("Cast", [name], [wrapped.input[position]], to=TensorProto.FLOAT))
    for position, name in enumerate(node.output):
        if name and types.get(name) == dtype:
            wrapped.output[position] = f"{name}.float32"
            after.append(helper.make_node("Cast", [wrapped.output[position]], [name], to=dtype))
    return [*before, wrapped, *after]

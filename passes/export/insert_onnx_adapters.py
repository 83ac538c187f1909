"""Add inputs for adapters to an ONNX graph, with default values of rank 0 that do not change its results.

With A [in, r] and B [r, out], so that ΔWᵀ = A B:

    y = MatMul(x, Wᵀ), Gemm(x, W)   →   y + (x A) B, the last product and the sum as one Gemm over rows
    any other use of W              →   W + ΔW in place of W

A and B are graph inputs with initializers of rank 0, which ONNX uses as default values: without an adapter, the graph
gives the same results as before. In the bodies of loops and branches, only the second form is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper

from passes.base import PassError
from passes.export.cast_onnx import find_graphs

#: The first version of the file format in which inputs can override initializers.
_LEAST_IR_VERSION = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxSite:
    """A weight of an ONNX graph that gets inputs for an adapter.

    Attributes:
        initializer: the weight's name in the graph.
        out_features: d1, the rows of ΔW.
        in_features: d2, its columns.
        transposed: the weight is stored [in, out], not [out, in].
        left: name of the input A [in, r].
        right: name of the input B [r, out].
    """

    initializer: str
    out_features: int
    in_features: int
    transposed: bool
    left: str
    right: str


@dataclasses.dataclass(frozen=True)
class _Use:
    """A product with the weight: its node, and the name of its input x."""

    node: onnx.NodeProto
    x: str


def insert_onnx_adapter(model: onnx.ModelProto, site: OnnxSite) -> None:
    """Add the inputs of one site and the nodes that use them.

    Args:
        model: edited in place, after all checks.
        site: the weight and the names of the inputs.

    Raises:
        PassError: the graph has no weight of this name and size, or already has the inputs.
    """
    weight = _find_weight(model, site)
    _add_inputs(model, site, weight)
    graph = model.graph
    products = _find_products(graph, site)
    served = {name for use in products for name in (use.node.output[0], use.node.input[1])}
    _rename_uses(graph, site.initializer, f"{site.initializer}.adapted", served)
    for use in products:
        _add_to_product(graph, use, site)
    if any(f"{site.initializer}.adapted" in node.input for body in find_graphs(graph) for node in body.node):
        _add_to_weight(graph, site, weight)
    model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)


def _find_weight(model: onnx.ModelProto, site: OnnxSite) -> onnx.TensorProto:
    names = {value.name for value in model.graph.input}
    if {site.left, site.right} & names:
        raise PassError(f"site {site.initializer}: the graph already has inputs {site.left} and {site.right}")
    weight: onnx.TensorProto | None = next(
        (tensor for tensor in model.graph.initializer if tensor.name == site.initializer), None
    )
    if weight is None:
        raise PassError(f"the graph has no initializer {site.initializer}")
    size = 1
    for dimension in weight.dims:
        size *= dimension
    if size != site.out_features * site.in_features:
        raise PassError(
            f"initializer {site.initializer} has shape {list(weight.dims)}, expected {site.out_features} × "
            f"{site.in_features} values"
        )
    return weight


def _add_inputs(model: onnx.ModelProto, site: OnnxSite, weight: onnx.TensorProto) -> None:
    rank = f"{site.initializer}.rank"
    shapes: dict[str, list[str | int | None]] = {
        site.left: [site.in_features, rank],
        site.right: [rank, site.out_features],
    }
    for name, shape in shapes.items():
        model.graph.input.append(helper.make_tensor_value_info(name, weight.data_type, shape))
        default = [size if isinstance(size, int) else 0 for size in shape]
        model.graph.initializer.append(helper.make_tensor(name, weight.data_type, default, b"", raw=True))


def _find_products(graph: onnx.GraphProto, site: OnnxSite) -> list[_Use]:
    """Nodes of the outermost graph that multiply an activation by the whole weight."""
    wanted = {site.initializer} if site.transposed else _find_transposed_names(graph, site)
    found = [
        _Use(node, node.input[0])
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in wanted and node.input[0] not in wanted
    ]
    stored_for_gemm = int(not site.transposed)
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] != site.initializer or node.input[0] == site.initializer:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        is_plain = attributes.get("alpha", 1.0) == 1.0 and not attributes.get("transA", 0)
        if is_plain and attributes.get("transB", 0) == stored_for_gemm:
            found.append(_Use(node, node.input[0]))
    return found


def _find_transposed_names(graph: onnx.GraphProto, site: OnnxSite) -> set[str]:
    """Names of the weight's transposes that are used only by matrix products in the outermost graph."""
    names = set()
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] != site.initializer:
            continue
        permutation = next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])
        users = [user for body in find_graphs(graph) for user in body.node if node.output[0] in user.input]
        is_read_by_products = all(user.op_type == "MatMul" and user.input[1] == node.output[0] for user in users)
        in_outermost = all(user in graph.node for user in users)
        if permutation == [1, 0] and is_read_by_products and in_outermost:
            names.add(node.output[0])
    return names


def _rename_uses(graph: onnx.GraphProto, name: str, wanted: str, served: set[str]) -> None:
    """Let every node read the value ``wanted`` instead of ``name``, except nodes with an output in ``served``."""
    for body in find_graphs(graph):
        for node in body.node:
            if node.output[0] in served:
                continue
            for position, operand in enumerate(node.input):
                if operand == name:
                    node.input[position] = wanted


def _add_to_product(graph: onnx.GraphProto, use: _Use, site: OnnxSite) -> None:
    """Add the update to y; one Gemm multiplies and adds, so an adapter of rank 0 costs no separate addition."""
    output = use.node.output[0]
    bare = f"{output}.bare"
    use.node.output[0] = bare
    position = next(i for i, node in enumerate(graph.node) if node.output[0] == bare)
    for offset, node in enumerate(_build_update(use, site, bare, output), 1):
        graph.node.insert(position + offset, node)


def _build_update(use: _Use, site: OnnxSite, bare: str, output: str) -> Iterator[onnx.NodeProto]:
    def make(kind: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [name], name=f"{name}.node", **attributes)

    hidden = f"{output}.hidden"
    if use.node.op_type == "Gemm":
        yield make("MatMul", [use.x, site.left], hidden)
        yield make("Gemm", [hidden, site.right, bare], output)
        return
    rows, bare_rows, adapted_rows, shape = (f"{output}.{part}" for part in ("x", "bare.rows", "rows", "shape"))
    yield make("Flatten", [use.x], rows, axis=-1)
    yield make("MatMul", [rows, site.left], hidden)
    yield make("Flatten", [bare], bare_rows, axis=-1)
    yield make("Gemm", [hidden, site.right, bare_rows], adapted_rows)
    yield make("Shape", [bare], shape)
    yield make("Reshape", [adapted_rows, shape], output)


def _add_to_weight(graph: onnx.GraphProto, site: OnnxSite, weight: onnx.TensorProto) -> None:
    """Compute W + ΔW at the start of the graph, in the weight's layout."""
    name = site.initializer
    nodes = [helper.make_node("MatMul", [site.left, site.right], [f"{name}.update"], name=f"{name}.update.node")]
    last = f"{name}.update"
    if not site.transposed:
        nodes.append(helper.make_node("Transpose", [last], [f"{last}.t"], perm=[1, 0], name=f"{last}.t.node"))
        last = f"{last}.t"
    if len(weight.dims) != 2:
        shape = helper.make_tensor(f"{name}.shape", onnx.TensorProto.INT64, [len(weight.dims)], list(weight.dims))
        graph.initializer.append(shape)
        nodes.append(helper.make_node("Reshape", [last, shape.name], [f"{last}.r"], name=f"{last}.r.node"))
        last = f"{last}.r"
    nodes.append(helper.make_node("Add", [name, last], [f"{name}.adapted"], name=f"{name}.adapted.node"))
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)

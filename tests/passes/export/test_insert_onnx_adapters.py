"""Rewrites of small ONNX graphs, run by onnx's reference implementation and by onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from passes.base import PassError
from passes.export.insert_onnx_adapters import OnnxSite, insert_onnx_adapter

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 4)).astype(np.float32)
X = RNG.standard_normal((3, 4)).astype(np.float32)
A = RNG.standard_normal((4, 2)).astype(np.float32)
B = RNG.standard_normal((2, 4)).astype(np.float32)

TRANSPOSED = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), helper.make_node("MatMul", ["x", "wt"], ["y"])]
UPDATE = ["y.bare", "y.x", "y.hidden", "y.bare.rows", "y.rows", "y.shape", "y"]
GRAPHS: dict[str, tuple[list[onnx.NodeProto], bool, list[str]]] = {
    "transposed product": (TRANSPOSED, False, ["wt", *UPDATE]),
    "product": (
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        True,
        UPDATE,
    ),
    "gemm": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        False,
        ["y.bare", "y.hidden", "y"],
    ),
    "scaled gemm": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)],
        False,
        ["w.update", "w.update.t", "w.adapted", "y"],
    ),
    "einsum": (
        [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ni,oi->no")],
        False,
        ["w.update", "w.update.t", "w.adapted", "y"],
    ),
    "weight on the left": (
        [helper.make_node("MatMul", ["w", "xt"], ["yt"]), helper.make_node("Transpose", ["yt"], ["y"], perm=[1, 0])],
        False,
        ["xt", "w.update", "w.update.t", "w.adapted", "yt", "y"],
    ),
}


def make_model(nodes: list[onnx.NodeProto], weight: Any = W) -> onnx.ModelProto:
    before = [helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0])] if "xt" in nodes[0].input else []
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph([*before, *nodes], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def evaluate(model: onnx.ModelProto, **feeds: Any) -> Any:
    outputs: Any = ReferenceEvaluator(model).run(None, feeds)
    return outputs[0]


def make_site(*, transposed: bool) -> OnnxSite:
    return OnnxSite(initializer="w", out_features=4, in_features=4, transposed=transposed, left="A", right="B")


@pytest.mark.parametrize("name", GRAPHS)
def test_each_use_of_a_weight(name: str) -> None:
    nodes, transposed, values = GRAPHS[name]
    model, update = make_model(nodes), A @ B
    plain = evaluate(model, x=X)
    insert_onnx_adapter(model, make_site(transposed=transposed))
    onnx.checker.check_model(model)
    assert sorted(value for node in model.graph.node for value in node.output) == sorted(values)
    merged = make_model(nodes, W + (update if transposed else update.T))
    expected = evaluate(merged, x=X)
    found = evaluate(model, x=X, A=A, B=B)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    empty = {"A": np.zeros((4, 0), np.float32), "B": np.zeros((0, 4), np.float32)}
    assert np.array_equal(evaluate(model, x=X, **empty), plain)
    defaults = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert (defaults["A"], defaults["B"]) == ([4, 0], [0, 4])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 3, 4)])
def test_products_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [onnx.numpy_helper.from_array(W, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    insert_onnx_adapter(model, make_site(transposed=True))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    values = RNG.standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": values})[0], values @ W, rtol=1e-6, atol=1e-6)
    adapted = session.run(None, {"x": values, "A": A, "B": B})[0]
    assert adapted.shape == values.shape
    np.testing.assert_allclose(adapted, values @ W + values @ A @ B, rtol=1e-4, atol=1e-5)


def test_wrong_sites_are_refused() -> None:
    model = make_model(TRANSPOSED)
    with pytest.raises(PassError, match="no initializer v"):
        insert_onnx_adapter(
            model, OnnxSite(initializer="v", out_features=4, in_features=4, transposed=False, left="A", right="B")
        )
    with pytest.raises(PassError, match="expected 5 × 4 values"):
        insert_onnx_adapter(
            model, OnnxSite(initializer="w", out_features=5, in_features=4, transposed=False, left="A", right="B")
        )
    insert_onnx_adapter(model, make_site(transposed=False))
    with pytest.raises(PassError, match="already has inputs"):
        insert_onnx_adapter(model, make_site(transposed=False))

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from passes.export.cast_onnx import cast_operator


def make_model(dtype: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"])]
    weight = helper.make_tensor("w", dtype, [2, 2], [1.0, 2.0, 3.0, 4.0])
    x, y = (helper.make_tensor_value_info(name, dtype, ["n", 2]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def describe(model: onnx.ModelProto) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in model.graph.node]


def test_one_type_of_operator_gets_casts() -> None:
    model = make_model(TensorProto.BFLOAT16)
    assert cast_operator(model, "Gemm") == 1
    assert describe(model) == [
        "h = Relu(x)",
        "y.input_0.float32 = Cast(h)",
        "y.input_1.float32 = Cast(w)",
        "y.float32 = Gemm(y.input_0.float32, y.input_1.float32)",
        "y = Cast(y.float32)",
    ]
    onnx.checker.check_model(model, full_check=True)
    assert cast_operator(model, "Gemm") == 0


def test_float32_is_not_changed() -> None:
    model = make_model(TensorProto.FLOAT)
    before = model.SerializeToString()
    assert cast_operator(model, "Gemm") == 0
    assert model.SerializeToString() == before

"""What rounding does to a merged update: for each weight, ‖quantization error‖ over ‖ΔW‖.

A merged file holds W + ΔW. If few bits move it by more than ΔW did, the update is lost in rounding, whatever the
outputs on a few samples look like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
from onnx import helper, numpy_helper

from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.quantization.prepare import Prepared
from adapter_compiler.onnx.verification.verify import open_session

#: Weights that an error lists.
_LISTED = 8

Array = numpy.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRounding:
    """One weight with an update.

    Attributes:
        weight: its name in the model.
        error: ‖Q(W + ΔW) − (W + ΔW)‖, Frobenius.
        update: ‖ΔW‖.
        is_residual: whether the update is kept in float beside the weight, so that ``error`` is that of W and the
            update is not rounded.
    """

    weight: str
    error: float
    update: float
    is_residual: bool = False

    @property
    def ratio(self) -> float:
        """The error over the update."""
        return self.error / self.update


def measure_rounding(
    prepared: Prepared, quantized: Path, updates: Mapping[str, float], weights: Mapping[str, Any]
) -> tuple[list[WeightRounding], list[str]]:
    """The rounding of each weight that has an update, and the weights that the file does not have as a whole.

    Args:
        prepared: the float file.
        quantized: the file that was made from it.
        updates: ‖ΔW‖ by weight, from the metadata of the source.
        weights: where the weights are, from the same.
    """
    exact, small = onnx.load(prepared.path), onnx.load(quantized)
    values = {tensor.name: tensor for tensor in exact.graph.initializer}
    found, unknown = [], []
    for weight, update in updates.items():
        if not update:
            continue
        entry = weights.get(weight)
        name = None if entry is None else prepared.find_name(entry["initializer"])
        rounded = None if name is None or name not in values else read_rounded(small, name)
        if rounded is None:
            unknown.append(weight)
            continue
        wanted = numpy_helper.to_array(values[name]).astype(numpy.float64)
        error = float(numpy.linalg.norm(rounded.astype(numpy.float64) - wanted))
        found.append(WeightRounding(weight=weight, error=error, update=update))
    return found, unknown


def read_rounded(model: onnx.ModelProto, name: str) -> Array | None:
    """The values that a quantized file computes with in place of a weight; ``None`` if they cannot be found."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if f"{name}_quantized" in tensors:
        parts = (numpy_helper.to_array(tensors[f"{name}_{part}"]) for part in ("quantized", "scale", "zero_point"))
        return _dequantize(*parts)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.input[1].startswith(f"{name}_Q"):
            return _multiply_identity(model, node)
    return numpy_helper.to_array(tensors[name]) if name in tensors else None


def assert_not_swallowed(found: Sequence[WeightRounding], kind: str, largest_ratio: float) -> None:
    """Raise :class:`VerificationError` if rounding changes a weight by more than ``largest_ratio`` times its update."""
    lost = find_swallowed(found, largest_ratio)
    if not lost:
        return
    listed = ", ".join(f"{one.weight} ({one.ratio:.3g})" for one in lost[:_LISTED])
    more = f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
    raise VerificationError(
        f"{kind} would swallow the updates of {len(lost)} of {len(found)} weights: ‖quantization error‖ / ‖ΔW‖ is "
        f"above {largest_ratio:g} for {listed}{more}; no file was written; keep these updates in float beside the "
        "weights (quantize_onnx(..., residual=adapted)), quantize an export with adapters='runtime', take more bits, "
        "or raise largest_ratio"
    )


def find_swallowed(found: Sequence[WeightRounding], largest_ratio: float) -> list[WeightRounding]:
    """The weights above the limit, the worst ones first."""
    lost = [one for one in found if not one.is_residual and not one.ratio <= largest_ratio]
    return sorted(lost, key=lambda one: -one.ratio)


def describe_rounding(found: Sequence[WeightRounding]) -> Iterator[str]:
    """The ratios in a few lines."""
    merged, kept = ([one for one in found if one.is_residual is flag] for flag in (False, True))
    if merged:
        worst = max(merged, key=lambda one: one.ratio)
        yield (
            f"‖quantization error‖ / ‖ΔW‖ of {len(merged)} merged weights: at most {worst.ratio:.3g} ({worst.weight})"
        )
    if kept:
        yield f"updates kept in float beside {len(kept)} weights: {', '.join(one.weight for one in kept)}"


def _dequantize(values: Array, scale: Array, zero_point: Array) -> Array:
    """(q − zero point) · scale; a scale for each column of a matrix, for each first entry of a kernel."""
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[1 if values.ndim == 2 else 0] = scale.size
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    result: Array = (values.astype(numpy.float64) - zero_point.astype(numpy.float64)) * scale
    return result


def _multiply_identity(model: onnx.ModelProto, node: onnx.NodeProto) -> Array:
    """The weight as onnxruntime itself reads it: the product of the identity with it."""
    rows = next(attribute.i for attribute in node.attribute if attribute.name == "K")
    float_ = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(node.input[0], float_, [rows, rows])]
    outputs = [helper.make_tensor_value_info(node.output[0], float_, None)]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in set(node.input)]
    alone = helper.make_model(
        helper.make_graph([node], "weight", inputs, outputs, tensors),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    session = open_session(alone.SerializeToString())
    result: Array = session.run(None, {node.input[0]: numpy.eye(rows, dtype=numpy.float32)})[0]
    return result

"""float16, with the operators that need float32 found by measuring what their rounding does to the outputs."""

from __future__ import annotations

import collections
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import onnx
import torch
from onnx import helper

from adapter_compiler.onnx.quantization.prepare import Prepared, restore_defaults
from adapter_compiler.onnx.verification.values import run_session
from adapter_compiler.onnx.verification.verify import open_session
from adapter_compiler.saving.onnx_files.large_weights import save_model

_LARGEST = float(numpy.finfo(numpy.float16).max)

#: The largest error of a file on the samples, relative to the largest value of its output; inf if it does not load.
Measure = Callable[[Path], float]


def write_float16(
    prepared: Prepared,
    target: Path,
    batches: Sequence[dict[str, torch.Tensor]],
    measure: Measure,
    accepted: float,
) -> tuple[str, ...]:
    """Write a file that computes in float16 as far as the error allows; inputs and outputs keep their dtypes.

    Nodes whose values exceed float16's range on the batches stay in float32. If the error is still above ``accepted``,
    all kinds of operators stay, and each is then tried in float16, the most frequent ones first, and left there if the
    error allows it.

    Args:
        prepared: the float file.
        target: the file to write.
        batches: inputs on which the ranges of values are measured.
        measure: the error of a file.
        accepted: the largest error that is accepted.

    Returns:
        The nodes (``Exp.12``) and kinds of operators (``all Softmax``) that stay in float32.
    """
    too_large = find_large_nodes(prepared.path, batches)
    nodes = sorted({*prepared.kept, *too_large})
    _convert(prepared, target, nodes, [])
    if measure(target) <= accepted:
        return tuple(too_large)
    counts = collections.Counter(node.op_type for node in onnx.load(prepared.path).graph.node)
    kinds = [kind for kind, _ in counts.most_common()]
    kept = list(kinds)
    for kind in sorted(kinds, key=lambda kind: kind not in ("MatMul", "Gemm", "Conv")):
        trial = [one for one in kept if one != kind]
        _convert(prepared, target, nodes, trial)
        if measure(target) <= accepted:
            kept = trial
    _convert(prepared, target, nodes, kept)
    return (*too_large, *(f"all {kind}" for kind in kept))


def find_large_nodes(path: Path, batches: Sequence[dict[str, torch.Tensor]]) -> list[str]:
    """The nodes that read or give finite values beyond float16's range on one of the batches."""
    model = onnx.load(path)
    given = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in given]
    for name in names:
        model.graph.output.append(helper.make_empty_tensor_value_info(name))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "all.onnx")
        session = open_session(Path(folder) / "all.onnx")
        large: set[str] = set()
        wanted = [value.name for value in session.get_outputs()]
        for batch in batches:
            for name, value in zip(wanted, run_session(session, wanted, batch), strict=True):
                large |= {name} if _is_large(value) else set()
    return [node.name for node in model.graph.node if not large.isdisjoint([*node.input, *node.output])]


def _is_large(value: torch.Tensor) -> bool:
    if not value.is_floating_point():
        return False
    finite = value[value.isfinite()].abs()
    # A mask of the least number of float32 stands for -inf, as the one of float16 does that takes its place.
    finite = finite[finite < 1e30]
    return bool(finite.numel()) and float(finite.max()) > _LARGEST


def _convert(prepared: Prepared, target: Path, nodes: Sequence[str], kinds: Sequence[str]) -> None:
    """Convert all but some nodes; what callers may replace stays as it is."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants that float16 cannot hold; the error is measured
        converted = convert_float_to_float16(
            str(prepared.with_inputs),
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kinds],
            node_block_list=list(nodes),
        )
    _skip_float16(converted.graph)
    OnnxModel.graph_topological_sort(converted.graph)  # the converter leaves its casts at the end
    restore_defaults(converted, prepared)
    save_model(converted, target)


def _skip_float16(graph: onnx.GraphProto) -> None:
    """Let a value go from one float32 operator to the next as it is: the converter casts it to float16 between."""
    down = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, onnx.TensorProto.FLOAT16)}
    for node in graph.node:
        if _casts_to(node, onnx.TensorProto.FLOAT) and node.input[0] in down:
            node.input[0] = down[node.input[0]]


def _casts_to(node: onnx.NodeProto, dtype: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == dtype for a in node.attribute)

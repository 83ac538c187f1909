"""Give PyTorch and onnxruntime the same "random" numbers, so that models that draw in eval mode can be compared.

An autoencoder that samples, dropout that stays on, random masking: two runs of these models never agree. For the
verification only, both sides replace each draw by the same fixed numbers, which depend on its shape only: the k-th
value of a uniform draw is the fractional part of k times the golden ratio. The file itself is not changed.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import torch
from onnx_ir import tape
from torch import Tensor

from adapter_compiler.onnx.verification.verify import Reference, open_session
from passes.capture.calls import ModuleCall
from passes.compat import TorchDispatchMode
from passes.export.decompositions.draws import draw_samples

_GOLDEN = 0.6180339887
#: A uniform draw, less 1/2 and times this, has the variance of a normal one.
_SPREAD = math.sqrt(12.0)
_DRAWING = {"RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike", "Bernoulli"}
aten = torch.ops.aten


def open_with_fixed_draws(
    draft: Path, session: onnxruntime.InferenceSession, reference: Reference
) -> tuple[onnxruntime.InferenceSession, Reference, int]:
    """A session and a reference that draw the same numbers, and the number of nodes that draw.

    Without such nodes, both are returned unchanged.
    """
    model = onnx_ir.load(draft)
    count = _replace_draws(model)
    if not count:
        return session, reference, 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / draft.name
        onnx_ir.save(model, copied, external_data="weights")
        return open_session(copied), functools.partial(_call_with_fixed_draws, reference), count


def _call_with_fixed_draws(reference: Reference, call: ModuleCall) -> Sequence[tuple[str, Tensor]]:
    with _FixedDraws():  # type: ignore[no-untyped-call]
        return reference(call)


class _FixedDraws(TorchDispatchMode):
    """PyTorch's side; operators that are not listed draw as usual."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func.overloadpacket)
        return func(*args, **(kwargs or {})) if replacement is None else replacement(*args, **(kwargs or {}))


def _uniform(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float32)
    return (steps * _GOLDEN).fmod(1.0).reshape(tuple(shape)).to(dtype or torch.get_default_dtype())


def _normal(shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return ((_uniform(shape, torch.float32) - 0.5) * _SPREAD).to(dtype or torch.get_default_dtype())


def _from_size(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda size, *_, dtype=None, **options: draw(size, dtype)


def _from_tensor(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda like, *_, dtype=None, **options: draw(like.shape, dtype or like.dtype)


def _bernoulli(values: Tensor, p: float | None = None, **_: Any) -> Tensor:
    return (_uniform(values.shape, torch.float32) < (values if p is None else p)).to(values.dtype)


def _bernoulli_(target: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    return target.copy_(_uniform(target.shape, torch.float32) < p)


def _dropout(values: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    kept = _uniform(values.shape, torch.float32) < (1.0 - p if train else 1.0)
    return torch.where(kept, values / (1.0 - p) if train else values, 0.0).to(values.dtype), kept


def _randperm(n: int, *_: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return _uniform((n,), torch.float32).argsort().to(dtype or torch.int64)


def _multinomial(p: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    with _FixedDraws():  # type: ignore[no-untyped-call]
        return draw_samples(p, num_samples, replacement)


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.rand: _from_size(_uniform),
    aten.rand_like: _from_tensor(_uniform),
    aten.randn: _from_size(_normal),
    aten.randn_like: _from_tensor(_normal),
    aten.randperm: _randperm,
    aten.bernoulli: _bernoulli,
    aten.bernoulli_: _bernoulli_,
    aten.multinomial: _multinomial,
    aten.native_dropout: _dropout,
}


def _replace_draws(model: onnx_ir.Model) -> int:
    """Replace every node that draws by one with fixed numbers; the number of these nodes."""
    drawing = [node for node in model.graph.all_nodes() if _draws(node)]
    for node in drawing:
        _replace_draw(node)
    return len(drawing)


def _draws(node: onnx_ir.Node) -> bool:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = onnx_ir.convenience.get_const_tensor(node.inputs[2])
        return training is not None and bool(training.numpy())
    return node.op_type in _DRAWING


def _replace_draw(node: onnx_ir.Node) -> None:
    graph = node.graph
    assert graph is not None
    builder = tape.Tape()
    results = list(_build(node, builder))
    graph.insert_before(node, list(builder.nodes))
    for old, new in zip(node.outputs, results, strict=False):
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{old.name}.drawn", old.name  # outputs are asked for by name
    graph.remove(node)


def _build(node: onnx_ir.Node, builder: tape.Tape) -> Iterator[onnx_ir.Value]:
    """The values that replace the outputs of a node that draws."""

    def constant(value: Any, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        return builder.op("Constant", [], {"value": onnx_ir.tensor(value, dtype=dtype)})

    def real(value: float) -> onnx_ir.Value:
        return constant(value, onnx_ir.DataType.FLOAT)

    like = node.inputs[0] if node.inputs else None
    if like is None:
        shape = constant(list(node.attributes["shape"].as_ints()), onnx_ir.DataType.INT64)
    else:
        shape = builder.op("Shape", [like])
    count = builder.op("ReduceProd", [shape], {"keepdims": 0})
    zero, one = (constant(value, onnx_ir.DataType.INT64) for value in (0, 1))
    steps = builder.op("Cast", [builder.op("Range", [zero, count, one])], {"to": onnx_ir.DataType.FLOAT})
    product = builder.op("Mul", [steps, real(_GOLDEN)])
    uniform = builder.op("Reshape", [builder.op("Mod", [product, real(1.0)], {"fmod": 1}), shape])
    if node.op_type == "Dropout":
        assert like is not None
        share = builder.op("Cast", [node.inputs[1]], {"to": onnx_ir.DataType.FLOAT})
        rest = builder.op("Sub", [real(1.0), share])
        kept = builder.op("Less", [uniform, rest])
        scaled = builder.op("Div", [like, builder.op("CastLike", [rest, like])])
        yield builder.op("Where", [kept, scaled, builder.op("CastLike", [real(0.0), like])])
        yield kept
        return
    if node.op_type == "Bernoulli":
        assert like is not None
        chance = builder.op("Cast", [like], {"to": onnx_ir.DataType.FLOAT})
        yield _cast(node, builder, builder.op("Less", [uniform, chance]), like)
        return
    first, second = ("low", "high") if "Uniform" in node.op_type else ("mean", "scale")
    begin, end = (
        node.attributes[name].as_float() if name in node.attributes else default
        for name, default in ((first, 0.0), (second, 1.0))
    )
    if first == "low":
        factor, offset = end - begin, begin
    else:
        factor, offset = end * _SPREAD, begin - 0.5 * end * _SPREAD
    yield _cast(node, builder, builder.op("Add", [builder.op("Mul", [uniform, real(factor)]), real(offset)]), like)


def _cast(node: onnx_ir.Node, builder: tape.Tape, value: onnx_ir.Value, like: onnx_ir.Value | None) -> onnx_ir.Value:
    if "dtype" in node.attributes:
        return builder.op("Cast", [value], {"to": node.attributes["dtype"].as_int()})
    return value if like is None else builder.op("CastLike", [value, like])

"""Operators for forms that rescale the rows of the sum, W' = c ∘ (W + ΔW), where an adapter runs on activations.

    y = x Wᵀ + b   →   y + (c - 1) ∘ (y - b) + c ∘ form(x)

W' and its gradient are never computed, and the change is exactly zero where c is 1 and ΔW is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from passes.forms.base import Call, Emitter, Value
from passes.planning.plan import PlannedAdapter

aten = torch.ops.aten


def emit_factor(emitter: Emitter, source: Value, adapter: PlannedAdapter, parameters: Mapping[str, Value]) -> Value:
    """c, [out], of a form that rescales; ``source`` is W."""
    matrix = emit_matrix(emitter, source, adapter)
    return adapter.form.emit_factor(emitter, matrix, parameters, adapter.scale)


def emit_matrix(emitter: Emitter, source: Value, adapter: PlannedAdapter) -> Value:
    """W, of the site's shape, as [out, in] in the adapter's dtype."""
    site, matrix = adapter.site, source
    if site.dtype != adapter.dtype:
        matrix = emitter.emit(aten.to.dtype, matrix, adapter.dtype)
    if site.transposed:
        return emitter.emit(aten.t.default, matrix)
    if len(site.shape) != 2:
        return emitter.emit(aten.reshape.default, matrix, [site.out_features, site.in_features])
    return matrix


def shape_factor(emitter: Emitter, kind: str, call: Call, factor: Value, adapter: PlannedAdapter) -> Value:
    """c in a shape that multiplies the output of a use: per feature, per channel, or per looked-up entry."""
    if kind == "lookup":
        x, *options = call.args[1:]
        columns = emitter.emit(aten.unsqueeze.default, factor, 1)
        return emitter.emit(aten.embedding.default, columns, x, *options[:1])
    if kind == "convolution":
        return emitter.emit(aten.reshape.default, factor, [-1, *[1] * (len(adapter.site.shape) - 2)])
    return factor


def emit_without_bias(emitter: Emitter, kind: str, call: Call, output: Value, adapter: PlannedAdapter) -> Value:
    """y - b, where y is ``output`` and b the bias in the arguments of ``call``, if there is one."""
    arguments, bias = call.args, None
    if call.target is aten.addmm.default:
        bias, beta = arguments[0], call.kwargs.get("beta", 1)
        if beta != 1:
            bias = emitter.emit(aten.mul.Tensor, bias, beta)
    elif kind in ("product", "convolution") and len(arguments) > 2:
        bias = arguments[2]
    if bias is None:
        return output
    if kind == "convolution":
        bias = emitter.emit(aten.reshape.default, bias, [-1, *[1] * (len(adapter.site.shape) - 2)])
    return emitter.emit(aten.sub.Tensor, output, bias)


def emit_rescaled(emitter: Emitter, base: Value, update: Value, factor: Value) -> Value:
    """c ∘ (base + update) - base, computed so that it is exactly zero where c is 1 and the update is 0."""
    change = emitter.emit(aten.mul.Tensor, base, emitter.emit(aten.sub.Scalar, factor, 1))
    return emitter.emit(aten.add.Tensor, change, emitter.emit(aten.mul.Tensor, update, factor))

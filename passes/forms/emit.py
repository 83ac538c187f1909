"""Sequences of operators that several forms share, for a left factor L, a middle factor m and a right factor R.

In the SVD form these are P [out, r], sλ [r] and Q [r, in]; in LoRA B [out, r], s and A [r, in].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.forms.base import Call, Emitter, Value

aten = torch.ops.aten

#: The convolution over each number of spatial dimensions.
_POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def emit_rows(emitter: Emitter, lookup: Call, left: Value, middle: Value, right: Value) -> Value:
    """(L[x] ∘ m) R for the indices x of ``lookup``; as for the weight itself, padding rows give no gradient."""
    x, *options = lookup.args[1:]
    rows = emitter.emit(aten.embedding.default, left, x, *options[:1])
    update = emitter.emit(aten.matmul.default, emitter.emit(aten.mul.Tensor, rows, middle), right)
    padding = options[0] if options else -1
    if padding == -1:
        return update
    is_padding = emitter.emit(aten.unsqueeze.default, emitter.emit(aten.eq.Scalar, x, padding), -1)
    return emitter.emit(aten.where.self, is_padding, emitter.emit(aten.detach.default, update), update)


def emit_two_convolutions(
    emitter: Emitter,
    convolution: Call,
    x: Value,
    left: Value,
    middle: Value,
    right: Value,
    kernel: Sequence[int],
) -> Value:
    """Convolve with the rows of R as r kernels, scale the r channels by m, mix them by L as a 1×1 kernel."""
    target, options = convolution.target, convolution.args[3:6]
    spatial = len(kernel) - 2
    down = emitter.emit(aten.reshape.default, right, [-1, *kernel[1:]])
    up = emitter.emit(aten.reshape.default, left, [kernel[0], -1, *[1] * spatial])
    if not isinstance(middle, (int, float)):
        middle = emitter.emit(aten.reshape.default, middle, [-1, *[1] * spatial])
    hidden = emitter.emit(target, x, down, None, *options)
    return emitter.emit(_POINTWISE[spatial], emitter.emit(aten.mul.Tensor, hidden, middle), up)


def emit_stacked_products(
    emitter: Emitter,
    product: Call,
    x: Value,
    left: Value,
    middle: Value,
    right: Value,
    stack: Sequence[int],
    *,
    reverse: bool,
) -> Value:
    """((x Rᵀ) ∘ m) Lₑᵀ for each matrix e of a stack, or ((x Lₑ) ∘ m) R if ``reverse``; all matrices share R."""
    rows = emitter.emit(aten.reshape.default, left, [*stack[:2], -1])
    if reverse:
        hidden = emitter.emit(aten.mul.Tensor, emitter.emit(product.target, x, rows), middle)
        return emitter.emit(aten.matmul.default, hidden, right)
    hidden = emitter.emit(aten.mul.Tensor, emitter.emit(aten.linear.default, x, right), middle)
    return emitter.emit(product.target, hidden, emitter.emit(aten.transpose.int, rows, 1, 2))

"""Awkward ways of using a weight: other ops, other layouts, computed from others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.awkward_base import (
    HIDDEN,
    TOKENS,
    WIDTH,
    describe_weights,
    images,
    rows,
    signals,
    tokens,
)


class LinearFunction(torch.autograd.Function):
    """A linear layer with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


def use_function(m: Any, x: Tensor) -> Any:
    """The linear layer with its own backward, and a plain one back."""
    return LinearFunction.apply(x, m.w).relu() @ m.w  # type: ignore[no-untyped-call]


def standardize(weight: Tensor) -> Tensor:
    """The weight with mean zero and variance one along each row."""
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)


def use_elementwise(m: Any, x: Tensor) -> Any:
    """A linear layer and a gate from the same square weight."""
    return F.linear(x, m.w) + x * m.w.diagonal() + m.w.square().mean()


def use_many_axes(m: Any, x: Tensor) -> Tensor:
    """Attention-like projections kept as (width, head, head width)."""
    queries, keys = torch.einsum("bld,dhe->blhe", x, m.q), torch.einsum("bld,dhe->blhe", x, m.k)
    weights = torch.einsum("bqhe,bkhe->bhqk", queries, keys).softmax(-1)
    return torch.einsum("bhqk,bkd,hde->bqe", weights, x, m.v)


WEIGHTS = (
    describe_weights(
        "functional-linear",
        "F.linear on raw Parameters",
        lambda m, x: F.linear(F.linear(x, m.up).relu(), m.down, m.bias),
        up=(HIDDEN, WIDTH),
        down=(WIDTH, HIDDEN),
        bias=(WIDTH,),
    ),
    describe_weights("matmul-right", "x @ W, W stored as (in, out)", lambda m, x: x @ m.w, w=(WIDTH, HIDDEN)),
    describe_weights("matmul-left", "W @ x, the weight on the left", lambda m, x: m.w @ x, signals, w=(HIDDEN, WIDTH)),
    describe_weights(
        "addmm",
        "torch.addmm with alpha and beta",
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
        rows,
        w=(WIDTH, HIDDEN),
        b=(HIDDEN,),
    ),
    describe_weights(
        "baddbmm",
        "torch.baddbmm, one weight for each head",
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1)[:4], m.w),
        w=(4, WIDTH, HIDDEN),
        b=(4, 1, HIDDEN),
    ),
    describe_weights(
        "bmm-expanded",
        "torch.bmm with a weight expanded over the batch",
        lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)),
        w=(WIDTH, HIDDEN),
    ),
    describe_weights(
        "expert-stack",
        "a mixture of experts stacked in one 3-D weight, all computed and gated",
        lambda m, x: (torch.matmul(x.unsqueeze(1), m.w) * (x @ m.gate).softmax(-1).transpose(1, 2).unsqueeze(3)).sum(1),
        traits=["experts"],
        w=(4, WIDTH, HIDDEN),
        gate=(WIDTH, 4),
    ),
    describe_weights(
        "einsum",
        "torch.einsum with three-axis weights",
        use_many_axes,
        traits=["einsum"],
        q=(WIDTH, 2, 8),
        k=(WIDTH, 2, 8),
        v=(2, WIDTH, WIDTH),
    ),
    describe_weights(
        "tensordot",
        "torch.tensordot over two axes at once",
        lambda m, x: torch.tensordot(x.unflatten(2, (4, 4)), m.w, dims=([2, 3], [0, 1])),
        w=(4, 4, HIDDEN),
    ),
    describe_weights(
        "vector-products",
        "mv, dot and an outer product",
        lambda m, x: torch.mv(x, m.v).outer(m.u) * m.s @ m.w,
        rows,
        v=(WIDTH,),
        u=(HIDDEN,),
        s=(1,),
        w=(HIDDEN, WIDTH),
    ),
    describe_weights(
        "factored-weight",
        "the weight is a product of two Parameters",
        lambda m, x: F.linear(x, m.left @ m.right),
        left=(HIDDEN, 8),
        right=(8, WIDTH),
    ),
    describe_weights(
        "standardized-weight",
        "the weight is standardized on every call",
        lambda m, x: F.linear(x, standardize(m.w)),
        w=(HIDDEN, WIDTH),
    ),
    describe_weights(
        "elementwise-and-linear",
        "one Parameter in a linear layer and in elementwise ops",
        use_elementwise,
        w=(WIDTH, WIDTH),
    ),
    describe_weights(
        "weight-in-output",
        "a weight is part of the output",
        lambda m, x: {"y": x @ m.w, "weight": m.w},
        w=(WIDTH, HIDDEN),
    ),
    describe_weights(
        "detached-weight",
        "a weight is detached on purpose",
        lambda m, x: F.linear(x @ m.w, m.fixed.detach()),
        traits=["no-gradient"],
        w=(WIDTH, HIDDEN),
        fixed=(WIDTH, HIDDEN),
    ),
    describe_weights(
        "custom-autograd",
        "a linear layer as an autograd.Function",
        use_function,
        rows,
        traits=["custom-autograd"],
        w=(HIDDEN, WIDTH),
    ),
    describe_weights(
        "prototypes", "distances to learned prototypes", lambda m, x: -torch.cdist(x, m.p).square(), p=(HIDDEN, WIDTH)
    ),
    describe_weights(
        "functional-embedding",
        "F.embedding on a raw table that is also multiplied",
        lambda m, ids: F.embedding(ids, m.table) @ m.table.t(),
        tokens,
        traits=["tied"],
        table=(TOKENS, WIDTH),
    ),
    describe_weights(
        "image-kernel",
        "F.conv2d with a raw kernel",
        lambda m, x: F.conv2d(x, m.w, stride=2).flatten(1),
        images,
        w=(HIDDEN, 3, 4, 4),
    ),
)

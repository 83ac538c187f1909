"""Dropout, attention and GELU that save less for backward, with the same results and random draws as torch's.

    memory_efficient_dropout     saves its mask as bytes, not in the dtype of x
    memory_efficient_attention   saves q, k, v, the probabilities and a mask of bytes; torch's attention with dropout
                                 saves scaled copies of q and k, the probabilities twice and the mask as floats
    tanh_gelu                    saves x, not each step of the formula
    recompute_layer_norm         the output of layer normalization, from what its backward saves anyway

Dropout and attention are for float32 and float64 on CPUs. In all other cases (other devices, half precision, autocast,
a mask that needs a gradient), torch's operators run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from passes.fuse.autocast import is_autocast
from passes.fuse.differentiate import differentiate, is_plain_needed

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float64)

#: Below this number of elements, the saving is not worth the overhead of a Python function.
_SMALL = 1 << 15


def memory_efficient_dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """``aten.dropout(x, p, train)``; a large x that needs a gradient is masked with bytes."""
    fits = train and x.numel() >= _SMALL and 0 < p < 1 and x.requires_grad and x.is_contiguous() and _is_plain(x)
    if not fits:
        return aten.dropout.default(x, p, train)  # type: ignore[no-any-return]
    return _Dropout.apply(x, p)  # type: ignore[no-any-return,no-untyped-call]


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``aten.scaled_dot_product_attention`` for q [B, H, L, E], k [B, H, S, E], v [B, H, S, F] → [B, H, L, F]."""
    three = (query, key, value)
    fits = 0 < dropout_p < 1 and not enable_gqa and all(_is_plain(t) and t.dim() == 4 for t in three)
    fits = fits and query.shape[:2] == key.shape[:2] == value.shape[:2] and len({t.dtype for t in three}) == 1
    if attn_mask is not None:
        fits = fits and not is_causal and not attn_mask.requires_grad and attn_mask.device == query.device
    if not fits or not any(t.requires_grad for t in three):
        return aten.scaled_dot_product_attention.default(  # type: ignore[no-any-return]
            *three, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = _make_bias(attn_mask, is_causal, query, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, bias, dropout_p, scale)  # type: ignore[no-any-return,no-untyped-call]


def tanh_gelu(x: torch.Tensor, c: float, k: float) -> torch.Tensor:
    """0.5 x (1 + tanh(c (x + k x³))), elementwise, as GPT-2 computes GELU; saves x only.

    Backward is that of torch's ``gelu(x, approximate="tanh")``, which has c = √(2/π) and k = 0.044715.
    """
    if is_autocast(x) or torch.compiler.is_compiling():
        return (x * 0.5) * (torch.tanh((x + torch.pow(x, 3.0) * k) * c) + 1.0)
    return _TanhGelu.apply(x, c, k)  # type: ignore[no-any-return,no-untyped-call]


def recompute_layer_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dims: int,
) -> torch.Tensor:
    """Layer normalization of x over its last ``dims`` dimensions, ((x - mean) ∘ rstd) ∘ weight + bias.

    ``mean`` and ``rstd`` are the statistics that the first run saved. If gradients are enabled, the statistics are
    recomputed from x, because they depend on it.
    """
    if torch.is_grad_enabled():
        own = [-1 - d for d in range(dims)]
        variance, now = torch.var_mean(x, own, correction=0, keepdim=True)
        epsilon = (rstd.pow(-2) - variance).detach()
        normal = (x - now) * torch.rsqrt(variance + epsilon)
    else:
        normal = (x - mean).mul_(rstd)
    scaled = normal if weight is None else normal * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def _is_plain(x: torch.Tensor) -> bool:
    is_plain = type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0
    return is_plain and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        noise = torch.empty_like(x).bernoulli_(1 - p)
        ctx.save_for_backward(noise.to(torch.int8))
        ctx.keep = 1 - p
        return noise.div_(ctx.keep).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return kept.to(gradient.dtype).div_(ctx.keep) * gradient, None


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: float, k: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.pow(x, 3.0).mul_(k).add_(x).mul_(c).tanh_().add_(1.0).mul_(x * 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return aten.gelu_backward.default(gradient, x, approximate="tanh"), None, None


class _Attention(torch.autograd.Function):
    """(softmax(s q kᵀ + bias) ∘ noise / (1 - p)) v, by the operators that torch uses, so the results are identical."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        p: float,
        scale: float,
    ) -> torch.Tensor:
        root = math.sqrt(scale)
        scores = torch.matmul(q * root, k.mT * root)
        probabilities = _softmax_(scores, bias)
        noise = scores.bernoulli_(1 - p)
        ctx.save_for_backward(q, k, v, bias, probabilities, noise.to(torch.int8))
        ctx.keep, ctx.scale = 1 - p, scale
        return torch.matmul(noise.div_(ctx.keep).mul_(probabilities), v)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v, bias, probabilities, kept = ctx.saved_tensors
        noise = kept.to(probabilities.dtype)
        if is_plain_needed((gradient,)):
            found = differentiate(
                lambda q, k, v: [_attend(q, k, v, bias, noise / ctx.keep, ctx.scale)],
                (q, k, v),
                ctx.needs_input_grad[:3],
                (gradient,),
            )
            return *found, None, None, None
        shapes = [t.shape for t in (q, k, v)]
        q, k, v, probabilities, noise, gradient = (
            t.reshape(-1, *t.shape[2:]) for t in (q, k, v, probabilities, noise, gradient)
        )
        dq = dk = dv = None
        if ctx.needs_input_grad[2]:
            dv = _product((noise * probabilities).mT, gradient, 1 / ctx.keep)
        if any(ctx.needs_input_grad[:2]):
            through = torch.bmm(gradient, v.mT).mul_(noise)
            through = aten._softmax_backward_data.default(through, probabilities, -1, probabilities.dtype)
            dq = _product(through, k, ctx.scale / ctx.keep)
            dk = _product(through.mT, q, ctx.scale / ctx.keep)
        shaped = (None if d is None else d.view(shape) for d, shape in zip((dq, dk, dv), shapes, strict=True))
        return *shaped, None, None, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    noise: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The plain formula, for gradients that are differentiated again."""
    return (_softmax_(q @ k.mT * scale, bias) * noise) @ v


def _softmax_(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Softmax of scores + bias, writing into the scores; rows that are fully masked become 0, as in torch."""
    if bias is None:
        return torch.softmax(scores, -1)
    probabilities = torch.softmax(scores.add_(bias), -1)
    is_masked = bias.amax(-1, keepdim=True) == -math.inf
    if bool(is_masked.any()):
        probabilities = probabilities.masked_fill(is_masked, 0)
    return probabilities


def _make_bias(
    mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The summand of the scores: 0 or -inf for a mask of bool (True: attend), a mask of floats itself."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)


def _product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """The batched product times a factor, in one kernel."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)

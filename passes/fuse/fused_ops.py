"""Differentiable functions for base layers with SVD or LoRA adapters: fewer kernels, less saved memory.

Without fusing, autograd saves x, x Qᵀ and (x Qᵀ) ∘ sλ for each site; these functions save x and x Qᵀ. Backward adds
into one gradient of x, instead of summing one tensor per branch.

    fused_linears     base linear layers that read the same x (query, key, value), each with its adapter;
                      one product x [Q1; Q2; …]ᵀ serves all of them
    fused_update      y + s (x Qᵀ ∘ λ) Pᵀ for any other product y with the weight

With λ = 0 the outputs are those of the base layer bit for bit. Under ``create_graph=True``, backward uses the plain
formula, so that it can be differentiated again (models whose forward computes a gradient need this).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from passes.fuse.autocast import is_autocast, without_autocast
from passes.fuse.differentiate import differentiate, is_plain_needed
from passes.fuse.memory_efficient_ops import recompute_layer_norm, tanh_gelu
from passes.fuse.stacked_factors import cast, join_factors, join_lambdas, split_ranks

#: Operands of one site in :func:`fused_linears`: weight, bias, P, λ, Q. λ is ``None`` for LoRA: P = B, Q = A.
OPERANDS_PER_SITE = 5

#: How to recompute x in backward: an operator of torch or the name of one in :data:`_NAMED_FUNCTIONS`, its positional
#: and keyword arguments, and the shape of x if it is a view of the result in another shape.
Recomputation = tuple[Callable[..., torch.Tensor] | str, Sequence[Any], Mapping[str, Any], Sequence[int] | None]

_NAMED_FUNCTIONS = {function.__name__: function for function in (recompute_layer_norm, tanh_gelu)}

#: Below this number of elements, x is saved: recomputing it saves too little memory.
_SMALL = 1 << 15

#: Below this number of rows, torch's own operators are faster (measured on a CPU: equal at about 100).
_FEW_ROWS = 64


def fused_linears(
    x: torch.Tensor,
    scales: Sequence[float],
    *operands: torch.Tensor | None,
    recomputation: Recomputation | None = None,
) -> tuple[torch.Tensor, ...]:
    """y_i = x W_iᵀ + b_i + s_i ((x Q_iᵀ) ∘ λ_i) P_iᵀ for sites that read the same x.

    Args:
        x: [..., in].
        scales: s of each site.
        operands: for each site W [out, in], b [out] or ``None``, P [out, r], λ [r] or ``None``, Q [r, in].
        recomputation: how to recompute x from tensors that autograd saves anyway; x itself is then not saved. Ignored
            for a small x, and under autocast, which is not active in backward.

    Returns:
        One tensor [..., out] per site.
    """
    is_compiling, is_cast = torch.compiler.is_compiling(), is_autocast(x)
    if not is_compiling and not is_cast and x.numel() < _FEW_ROWS * x.shape[-1] and _is_of_one_dtype(x, operands):
        return _separate_linears(x, scales, operands)
    if is_cast or (not is_compiling and x.numel() < _SMALL):
        recomputation = None
    return _FusedLinears.apply(x, tuple(scales), recomputation, *operands)  # type: ignore[no-any-return,no-untyped-call]


def _separate_linears(
    x: torch.Tensor, scales: Sequence[float], operands: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """The same by torch's own operators: for few rows, their C++ backward is faster in spite of more kernels."""
    rows, outputs = _as_rows(x), []
    for (W, b, P, lam, Q), scale in zip(_by_site(operands), scales, strict=True):
        hidden = linear(rows, Q)
        hidden = hidden if lam is None else hidden * lam
        output = torch.addmm(linear(rows, W, b), hidden, P.t(), alpha=scale)
        outputs.append(output if x.dim() == 2 else _with_shape(output, (*x.shape[:-1], output.shape[-1])))
    return tuple(outputs)


def _is_of_one_dtype(x: torch.Tensor, operands: Sequence[torch.Tensor | None]) -> bool:
    return all(operand is None or operand.dtype == x.dtype for operand in operands)


def fused_update(
    y: torch.Tensor, x: torch.Tensor, P: torch.Tensor, lam: torch.Tensor | None, Q: torch.Tensor, scale: float
) -> torch.Tensor:
    """y + s ((x Qᵀ) ∘ λ) Pᵀ for any y [..., out] and x [..., in]; P is [out, r], Q [r, in], λ [r] or ``None`` for 1."""
    return _FusedUpdate.apply(y, x, P, lam, Q, scale)  # type: ignore[no-any-return,no-untyped-call]


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: tuple[float, ...],
        recomputation: Recomputation | None,
        *operands: torch.Tensor | None,
    ) -> Any:
        sites = _by_site(operands)
        rows = _as_rows(x)
        outputs = [linear(rows, W, b) for W, b, _, _, _ in sites]
        with without_autocast(x):
            hidden, lambdas = _update_(outputs, rows, sites, scales)
        sources = [x] if recomputation is None else [a for a in recomputation[1] if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(hidden, lambdas, *operands, *sources)
        ctx.scales = scales
        ctx.shape = x.shape
        ctx.recomputation = None if recomputation is None else _without_tensors(recomputation)
        if x.dim() == 2:
            return tuple(outputs)
        leading = x.shape[:-1]
        return tuple(_with_shape(output, (*leading, output.shape[-1])) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, lambdas, *saved = ctx.saved_tensors
        scales, needed = ctx.scales, ctx.needs_input_grad
        count = OPERANDS_PER_SITE * len(scales)
        x = saved[count] if ctx.recomputation is None else _recompute(ctx.recomputation, saved[count:])
        if is_plain_needed(gradients):
            wanted = (needed[0], *needed[3:])
            dx, *others = differentiate(_plain_linears(scales), (x, *saved[:count]), wanted, gradients)
            return dx, None, None, *others
        sites = _by_site(saved[:count])
        rows = _as_rows(x)
        flat = [_as_rows(g) for g in gradients]
        factors = _factor_gradients(flat, rows, hidden, lambdas, sites, scales)
        found: list[torch.Tensor | None] = []
        for i, (g, (W, b, _, _, _)) in enumerate(zip(flat, sites, strict=True)):
            first = 3 + OPERANDS_PER_SITE * i
            found.append(cast(g.t() @ cast(rows, g.dtype), W.dtype) if needed[first] else None)
            found.append(cast(g.sum(dim=0), b.dtype) if needed[first + 1] else None)
            found += factors.by_site[i]
        dx = None
        if needed[0]:
            dx = torch.mm(flat[0], cast(sites[0][0], flat[0].dtype))
            for g, site in zip(flat[1:], sites[1:], strict=True):
                dx.addmm_(g, cast(site[0], g.dtype))
            _add_product_(dx, factors.reading.t(), join_factors([site[4] for site in sites], hidden.dtype), 1.0)
            dx = cast(dx, rows.dtype).view(ctx.shape)
        return dx, None, None, *found


class _SavedTensor:
    """Placeholder for a saved tensor among the arguments of a recomputation."""


def _without_tensors(recomputation: Recomputation) -> Recomputation:
    function, arguments, options, shape = recomputation
    return function, [_SavedTensor if isinstance(a, torch.Tensor) else a for a in arguments], options, shape


def _recompute(recomputation: Recomputation, saved: Sequence[Any]) -> torch.Tensor:
    """The x of forward, from the saved tensors in the order of the arguments."""
    name, arguments, options, shape = recomputation
    function = _NAMED_FUNCTIONS[name] if isinstance(name, str) else name
    tensors = iter(saved)
    x: torch.Tensor = function(*(next(tensors) if a is _SavedTensor else a for a in arguments), **options)
    return x if shape is None else x.view(shape)


class _FusedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        P: torch.Tensor,
        lam: torch.Tensor | None,
        Q: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        total = _as_rows(y).clone()
        with without_autocast(x):
            hidden, lambdas = _update_([total], _as_rows(x), [(None, None, P, lam, Q)], (scale,))
        ctx.save_for_backward(x, hidden, lambdas, P, lam, Q)
        ctx.scale = scale
        return _with_shape(total, y.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, hidden, lambdas, P, lam, Q = ctx.saved_tensors
        if is_plain_needed((gradient,)):
            wanted = ctx.needs_input_grad[1:5]
            found = differentiate(_plain_update(ctx.scale), (x, P, lam, Q), wanted, (gradient.to(P.dtype),))
            return gradient, *found, None
        sites = [(None, None, P, lam, Q)]
        factors = _factor_gradients([_as_rows(gradient)], _as_rows(x), hidden, lambdas, sites, (ctx.scale,))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = cast(factors.reading.t() @ cast(Q, hidden.dtype), x.dtype).view_as(x)
        return gradient, dx, *factors.by_site[0], None


Operands = Sequence[torch.Tensor | None]


def plain_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    P: torch.Tensor,
    lam: torch.Tensor | None,
    Q: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """x Wᵀ + b + s ((x Qᵀ) ∘ λ) Pᵀ by torch's own operators, for the operands of :func:`fused_linears`."""
    base = linear(x, W, b)
    (update,) = _plain_update(scale)(x, P, lam, Q)
    return base + update.to(base.dtype)


def _plain_linears(scales: Sequence[float]) -> Callable[..., list[torch.Tensor]]:
    def run(x: torch.Tensor, *operands: Any) -> list[torch.Tensor]:
        return [plain_linear(x, *site, s) for s, site in zip(scales, _by_site(operands), strict=True)]

    return run


def _plain_update(scale: float) -> Callable[..., list[torch.Tensor]]:
    def run(x: torch.Tensor, P: torch.Tensor, lam: torch.Tensor | None, Q: torch.Tensor) -> list[torch.Tensor]:
        hidden = linear(x.to(P.dtype), Q) * (scale if lam is None else lam * scale)
        return [linear(hidden, P)]

    return run


def _update_(
    outputs: Sequence[torch.Tensor], rows: torch.Tensor, sites: Sequence[Any], scales: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the updates of all sites to their outputs [rows, out], in place.

    The rank is the first dimension of all intermediate tensors: those products are up to twice as fast on CPUs.

    Returns:
        (x Qᵀ)ᵀ [Σr, rows] and λ [Σr, 1] of all sites.
    """
    dtype = _compute_dtype(outputs[0], sites[0][2])
    hidden = torch.mm(join_factors([site[4] for site in sites], dtype), cast(rows, dtype).t())
    lambdas = join_lambdas(sites, dtype)
    parts = split_ranks(hidden * lambdas, sites)
    for output, part, site, scale in zip(outputs, parts, sites, scales, strict=True):
        _add_product_(output, part.t(), cast(site[2], dtype).t(), scale)
    return hidden, lambdas


class _Factors(NamedTuple):
    """Gradients of P, λ (``None`` for sites without λ) and Q by site, and of (x Qᵀ)ᵀ of all sites, [Σr, rows]."""

    by_site: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]
    reading: torch.Tensor


def _factor_gradients(
    gradients: Sequence[torch.Tensor],
    rows: torch.Tensor,
    hidden: torch.Tensor,
    lambdas: torch.Tensor,
    sites: Sequence[Any],
    scales: Sequence[float],
) -> _Factors:
    """The backward of :func:`_update_`.

    Args:
        gradients: of the sites' outputs, [rows, out] each.
        rows: x, [rows, in].
        hidden: (x Qᵀ)ᵀ of all sites, [Σr, rows].
        lambdas: λ of all sites, [Σr, 1].
        sites: W, b, P, λ, Q of each.
        scales: s of each.
    """
    dtype = hidden.dtype
    through = torch.empty_like(hidden)
    dP = []
    stacks = (split_ranks(stack, sites) for stack in (through, hidden, lambdas))
    pieces = zip(gradients, *stacks, sites, scales, strict=True)
    for gradient, to, part, column, (_, _, P, _, _), scale in pieces:
        g = cast(gradient, dtype)
        to.addmm_(cast(P, dtype).t(), g.t(), beta=0, alpha=scale)
        product = g.new_empty(len(part), g.shape[1]).addmm_(part, g, beta=0, alpha=scale)
        # In the memory layout of P, so that autograd does not copy it.
        dP.append(torch.mul(product.t(), column.t(), out=torch.empty_like(P, memory_format=torch.contiguous_format)))
    dlam: Sequence[torch.Tensor | None] = [None] * len(sites)
    if any(site[3] is not None for site in sites):
        dlam = split_ranks(torch.linalg.vecdot(through, hidden), sites)
    through.mul_(lambdas)
    dQ = split_ranks(torch.mm(through, cast(rows, dtype)), sites)
    by_site = [
        (p, None if lam is None or d is None else cast(d, lam.dtype), cast(q, Q.dtype))
        for p, d, q, (_, _, _, lam, Q) in zip(dP, dlam, dQ, sites, strict=True)
    ]
    return _Factors(by_site, through)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., features] as [rows, features]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _with_shape(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The rows in another shape, not as a view: autograd forbids in-place changes of views that a function returns."""
    if len(shape) == 2:
        return rows
    reshaped: torch.Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return reshaped


def _by_site(operands: Sequence[Any]) -> list[tuple[Any, Any, Any, Any, Any]]:
    return [tuple(operands[i : i + OPERANDS_PER_SITE]) for i in range(0, len(operands), OPERANDS_PER_SITE)]


def _compute_dtype(output: torch.Tensor, factor: torch.Tensor) -> torch.dtype:
    """The dtype of the adapters, or under autocast that of the output, which autocast has chosen."""
    return output.dtype if is_autocast(output) else factor.dtype


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_((left @ right).to(total.dtype), alpha=scale)

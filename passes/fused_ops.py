"""Base layer and SVD adapter as one differentiable function each: fewer kernels, less saved memory.

What autograd would save for a site on its own is x, x Qᵀ, (x Qᵀ) ∘ sλ and the shapes; these functions save
x and x Qᵀ. Backward adds into one gradient of x instead of summing one tensor a branch.

    fused_linears     base linears that read the same x (query, key, value), each with its adapter;
                      one product x [Q1; Q2; …]ᵀ serves them all
    fused_update      y + s (x Qᵀ ∘ λ) Pᵀ for any other product y with the weight

With λ = 0 the outputs are those of the base layer bit for bit. Under ``create_graph=True`` backward goes through
the plain formula, so that it can be differentiated again (models whose forward computes a gradient need it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Operands of one site in :func:`fused_linears`: weight, bias, P, λ, Q.
OPERANDS_PER_SITE = 5


def fused_linears(x: torch.Tensor, scales: Sequence[float], *operands: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """y_i = x W_iᵀ + b_i + s_i ((x Q_iᵀ) ∘ λ_i) P_iᵀ for sites that read the same x.

    Args:
        x: [..., in].
        scales: s of each site.
        operands: for each site W [out, in] (frozen), b [out] or ``None`` (frozen), P [out, r], λ [r], Q [r, in].

    Returns:
        One tensor [..., out] a site.
    """
    return _FusedLinears.apply(x, tuple(scales), *operands)  # type: ignore[no-any-return,no-untyped-call]


def fused_update(
    y: torch.Tensor, x: torch.Tensor, P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor, scale: float
) -> torch.Tensor:
    """Add the update s ((x Qᵀ) ∘ λ) Pᵀ to y, for x [..., in] and y [..., out] of any origin."""
    return _FusedUpdate.apply(y, x, P, lam, Q, scale)  # type: ignore[no-any-return,no-untyped-call]


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: tuple[float, ...], *operands: torch.Tensor | None) -> Any:
        sites = _by_site(operands)
        rows = x.reshape(-1, x.shape[-1])
        outputs = [torch.nn.functional.linear(rows, W, b) for W, b, _, _, _ in sites]
        dtype = _compute_dtype(outputs[0], sites[0][2])
        with torch.autocast(x.device.type, enabled=False):
            Q = _stack([site[4] for site in sites], dtype)
            hidden = rows.to(dtype) @ Q.t()
            parts = _split(hidden, sites)
            for output, part, (_, _, P, lam, _), scale in zip(outputs, parts, sites, scales, strict=True):
                _add_product_(output, part * (lam * scale).to(dtype), P.to(dtype).t())
        ctx.save_for_backward(x, hidden, *operands)
        ctx.scales = scales
        return tuple(_with_shape(output, (*x.shape[:-1], output.shape[-1])) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, hidden, *operands = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, *others = _differentiate(_plain_linears(ctx.scales), (x, *operands), gradients)
            return dx, None, *others
        sites = _by_site(operands)
        rows = x.reshape(-1, x.shape[-1])
        dtype = hidden.dtype
        hidden_gradient = torch.empty_like(hidden)
        found: list[torch.Tensor | None] = []
        flat = [g.reshape(-1, g.shape[-1]) for g in gradients]
        parts = zip(_split(hidden, sites), _split(hidden_gradient, sites), strict=True)
        for g, (part, out), (_, _, P, lam, _), scale in zip(flat, parts, sites, ctx.scales, strict=True):
            dP, dlam = _factor_gradients(g.to(dtype), part, P, lam, scale, out)
            found += [None, None, dP, dlam, None]
        dQ = (hidden_gradient.t() @ rows.to(dtype)).split([len(site[4]) for site in sites])
        for i, (site, gradient) in enumerate(zip(sites, dQ, strict=True)):
            found[OPERANDS_PER_SITE * i + 4] = gradient.to(site[4].dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (hidden_gradient @ _stack([site[4] for site in sites], dtype)).to(flat[0].dtype)
            for g, (W, _, _, _, _) in zip(flat, sites, strict=True):
                dx.addmm_(g, W.to(g.dtype))
            dx = dx.to(x.dtype).view_as(x)
        return dx, None, *found


class _FusedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        P: torch.Tensor,
        lam: torch.Tensor,
        Q: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dtype = _compute_dtype(y, P)
        with torch.autocast(x.device.type, enabled=False):
            hidden = rows.to(dtype) @ Q.to(dtype).t()
            total = y.reshape(-1, y.shape[-1]).clone()
            _add_product_(total, hidden * (lam * scale).to(dtype), P.to(dtype).t())
        ctx.save_for_backward(x, hidden, P, lam, Q)
        ctx.scale = scale
        return _with_shape(total, y.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, hidden, P, lam, Q = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiate(_plain_update(ctx.scale), (x, P, lam, Q), (gradient.to(P.dtype),))
            return gradient, *found, None
        g = gradient.reshape(-1, gradient.shape[-1]).to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden)
        dP, dlam = _factor_gradients(g, hidden, P, lam, ctx.scale, hidden_gradient)
        dQ = (hidden_gradient.t() @ x.reshape(-1, x.shape[-1]).to(hidden.dtype)).to(Q.dtype)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = (hidden_gradient @ Q.to(hidden.dtype)).to(x.dtype).view_as(x)
        return gradient, dx, dP, dlam, dQ, None


Operands = Sequence[torch.Tensor | None]


def _differentiate(
    run: Callable[..., Sequence[torch.Tensor]], operands: Operands, gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients of ``run(*operands)`` that can be differentiated again; ``None`` where none is needed."""
    wanted = [operand for operand in operands if operand is not None and operand.requires_grad]
    outputs = run(*operands)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if operand is not None and operand.requires_grad else None for operand in operands]


def _plain_linears(scales: Sequence[float]) -> Callable[..., list[torch.Tensor]]:
    def run(x: torch.Tensor, *operands: torch.Tensor | None) -> list[torch.Tensor]:
        bases = [torch.nn.functional.linear(x, W, b) for W, b, _, _, _ in _by_site(operands)]
        updates = [_plain_update(s)(x, *site[2:])[0] for s, site in zip(scales, _by_site(operands), strict=True)]
        return [base + update.to(base.dtype) for base, update in zip(bases, updates, strict=True)]

    return run


def _plain_update(scale: float) -> Callable[..., list[torch.Tensor]]:
    def run(x: torch.Tensor, P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor) -> list[torch.Tensor]:
        hidden = torch.nn.functional.linear(x.to(P.dtype), Q) * (lam * scale)
        return [torch.nn.functional.linear(hidden, P)]

    return run


def _with_shape(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The rows in another shape, not as a view: autograd forbids changing a custom function's views in place."""
    reshaped: torch.Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return reshaped


def _factor_gradients(
    g: torch.Tensor, hidden: torch.Tensor, P: torch.Tensor, lam: torch.Tensor, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂L/∂P and ∂L/∂λ; the gradient of x Qᵀ goes into ``out``."""
    scaled = (lam * scale).to(hidden.dtype)
    through = g @ P.to(hidden.dtype)
    dP = g.t() @ (hidden * scaled)
    dlam = (through * hidden).sum(dim=0) * scale
    torch.mul(through, scaled, out=out)
    return dP.to(P.dtype), dlam.to(lam.dtype)


def _by_site(operands: Sequence[Any]) -> list[tuple[Any, Any, Any, Any, Any]]:
    return [tuple(operands[i : i + OPERANDS_PER_SITE]) for i in range(0, len(operands), OPERANDS_PER_SITE)]


def _split(hidden: torch.Tensor, sites: Sequence[Any]) -> Sequence[torch.Tensor]:
    return hidden.split([len(site[4]) for site in sites], dim=1) if len(sites) > 1 else [hidden]


def _stack(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(dtype)


def _compute_dtype(output: torch.Tensor, factor: torch.Tensor) -> torch.dtype:
    """The adapters' own dtype, but that of the output inside an autocast region (which made it narrower)."""
    return output.dtype if torch.is_autocast_enabled(output.device.type) else factor.dtype


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_((left @ right).to(total.dtype))

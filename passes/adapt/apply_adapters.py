"""Compute with adapted weights eagerly: the arithmetic of :mod:`passes.adapt.insert_adapters` on tensors, not nodes.

    adapted_linear    x W'ᵀ + b for one SVD or LoRA adapter, by the fused functions of :mod:`passes.fuse.fused_ops`
    adapted_output    any product, stack, lookup or convolution with the whole weight, any form
    adapted_sum       W' itself, for every other operator

All of these work with autograd, ``create_graph=True``, forward-mode derivatives, ``torch.func`` and compilers. Where
the fused functions do not, plain operators run instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from passes.adapt.emit_rescaled import emit_factor
from passes.adapt.emit_updates import AdaptedUse, emit_update, fits_activations
from passes.compat import is_transformed
from passes.forms.base import OperatorCall, TensorEmitter
from passes.fuse.autocast import without_autocast
from passes.fuse.fused_ops import Recomputation, fused_linears, plain_linear
from passes.planning.plan import PlannedAdapter

_EMITTER = TensorEmitter()

#: Forms whose update is (x Qᵀ ∘ λ) Pᵀ or (x Aᵀ) Bᵀ and nothing else: names of P, λ (``None`` without) and Q.
_FACTORS: Mapping[str, tuple[str, str | None, str]] = {"svd": ("P", "lam", "Q"), "lora": ("B", None, "A")}


@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """An adapter and the tensors that are its parameters at present.

    Attributes:
        planned: the adapter in the plan.
        parameters: its parameters by name, of the shapes ``planned.parameter_shapes``.
    """

    planned: PlannedAdapter
    parameters: Mapping[str, torch.Tensor]

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None:
        """P, λ and Q (B, ``None`` and A of LoRA), or ``None`` for other forms and for adapters of some rows only."""
        names = _FACTORS.get(self.planned.form.name)
        if names is None or self.planned.site.rows is not None:
            return None
        P, lam, Q = names
        return self.parameters[P], None if lam is None else self.parameters[lam], self.parameters[Q]


def adapted_sum(weight: torch.Tensor, adapters: Sequence[BoundAdapter]) -> torch.Tensor:
    """W' for W and its adapters, in the shape and dtype of W, also under autocast."""
    with without_autocast(weight):
        total = weight
        for adapter in adapters:
            total = adapter.planned.add_to(total, adapter.parameters)
        return total


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: BoundAdapter,
    factors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    *,
    fused: bool,
    recomputation: Recomputation | None,
) -> torch.Tensor:
    """x W'ᵀ + b, [..., out], for one SVD or LoRA adapter.

    Args:
        x: [..., in].
        weight: W, [out, in].
        bias: b, [out], or ``None``.
        adapter: an adapter of the whole weight.
        factors: its :attr:`BoundAdapter.factors`.
        fused: whether the functions of :mod:`passes.fuse.fused_ops` may be used.
        recomputation: how backward can recompute x, see :func:`passes.fuse.fused_ops.fused_linears`.
    """
    P, lam, Q = factors
    if not fused or is_transformed():
        return plain_linear(x, weight, bias, P, lam, Q, adapter.planned.scale)
    return fused_linears(x, (adapter.planned.scale,), weight, bias, P, lam, Q, recomputation=recomputation)[0]


def adapted_output(
    kind: str,
    call: OperatorCall,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[BoundAdapter],
    *,
    transposed: bool,
) -> torch.Tensor | None:
    """The result of an operator with W' in place of W, or ``None`` if that cannot be computed on activations.

    Args:
        kind: ``product``, ``stack``, ``lookup`` or ``convolution``.
        call: the operator and its arguments, with W.
        x: its operand besides the weight.
        weight: W, in the stored layout.
        adapters: the adapters of the weight.
        transposed: for products, whether the operator computes x W and not x Wᵀ; for stacks, x Wₑ and not x Wₑᵀ.
    """
    uses = []
    for adapter in adapters:
        site = adapter.planned.site
        reverse = transposed if kind == "stack" else transposed != site.transposed
        if not fits_activations(kind, adapter.planned, reverse=reverse):
            return None
        uses.append((adapter, reverse))
    output = total = call.run()
    for adapter, reverse in uses:
        planned, parameters = adapter.planned, adapter.parameters
        use = AdaptedUse(kind=kind, call=call, x=x, output=output, reverse=reverse)
        factor = emit_factor(_EMITTER, weight, planned, parameters) if planned.form.rescales else None
        total = total + emit_update(_EMITTER, use, planned, parameters, factor)
    return total

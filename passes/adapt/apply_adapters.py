"""Compute with W + ΔW at once: the arithmetic of :mod:`passes.adapt.insert_adapters` on tensors instead of nodes.

    adapted_linear    x W'ᵀ + b for one SVD or LoRA adapter, the quick way of :mod:`passes.fuse.fused_ops`
    adapted_output    any product, stack, lookup or convolution with the whole weight, any form
    adapted_sum       W' itself, for every other operator

Whatever runs is right under autograd, ``create_graph=True``, forward-mode derivatives, ``torch.func`` and compilers:
where one of those is at work, plain operators take the place of functions with a backward of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.autograd import forward_ad

from passes.adapt.emit_rescaled import emit_factor
from passes.adapt.emit_updates import AdaptedUse, emit_update, fits_activations
from passes.forms.base import OperatorCall, TensorEmitter
from passes.fuse.fused_ops import Recomputation, fused_linears, plain_linear
from passes.planning.plan import PlannedAdapter

_EMITTER = TensorEmitter()

#: Forms whose update is (x Qᵀ ∘ λ) Pᵀ or (x Aᵀ) Bᵀ and nothing else: names of P, λ (``None`` without) and Q.
_FACTORS: Mapping[str, tuple[str, str | None, str]] = {"svd": ("P", "lam", "Q"), "lora": ("B", None, "A")}


@dataclasses.dataclass(frozen=True)
class BoundAdapter:
    """An adapter and the tensors that are its parameters at the moment."""

    planned: PlannedAdapter
    parameters: Mapping[str, torch.Tensor]

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None:
        """P, λ and Q, where the update is their product and covers the whole weight; λ is ``None`` for LoRA."""
        names = _FACTORS.get(self.planned.form.name)
        if names is None or self.planned.site.rows is not None:
            return None
        P, lam, Q = names
        return self.parameters[P], None if lam is None else self.parameters[lam], self.parameters[Q]


def adapted_sum(weight: torch.Tensor, adapters: Sequence[BoundAdapter]) -> torch.Tensor:
    """W' of W and its adapters, in the dtype of W, whatever autocast says."""
    with _without_autocast(weight):
        total = weight
        for adapter in adapters:
            planned, parameters = adapter.planned, adapter.parameters
            total = planned.rescale(total + planned.delta(parameters).to(weight.dtype), parameters)
        return total


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: BoundAdapter,
    factors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    *,
    fused: bool,
    again: Recomputation | None,
) -> torch.Tensor:
    """X W'ᵀ + b for W [out, in].

    Args:
        x: [..., in].
        weight: W.
        bias: b, [out], or ``None``.
        adapter: an adapter of the whole weight.
        factors: its P, λ, Q, as :attr:`BoundAdapter.factors` gives them.
        fused: whether the functions of :mod:`passes.fuse.fused_ops` may be used.
        again: how backward can make x once more, see :func:`passes.fuse.fused_ops.fused_linears`.
    """
    P, lam, Q = factors
    if not fused or is_transformed():
        return plain_linear(x, weight, bias, P, lam, Q, adapter.planned.scale)
    return fused_linears(x, (adapter.planned.scale,), weight, bias, P, lam, Q, again=again)[0]


def adapted_output(
    kind: str,
    call: OperatorCall,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[BoundAdapter],
    *,
    transposed: bool,
) -> torch.Tensor | None:
    """What an operator returns with W' in place of the whole weight W; ``None`` if only W' itself will do.

    Args:
        kind: ``product``, ``stack``, ``lookup`` or ``convolution``.
        call: the operator with W.
        x: what it reads beside the weight.
        weight: W, as it is stored.
        adapters: those of the weight.
        transposed: for products, whether W takes part as stored [in, out]; for stacks, whether it is x Wₑ.
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


def is_transformed() -> bool:
    """Whether something differentiates, batches, records or compiles in a way that needs plain operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    kind = tensor.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext()

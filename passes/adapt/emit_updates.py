"""What an adapter adds to the output of an operator that uses its weight, in a graph or at once.

    y = x Wᵀ, x W (product), x Wₑ, x Wₑᵀ (stack)      →   form(x), or reversed
    y = W[x] (lookup), y = x ∗ W (convolution)         →   form(x)
    a form that rescales, W' = c ∘ (W + ΔW)            →   (c - 1) ∘ (y - b) + c ∘ form(x)

An adapter for some rows of W fills its update up with zeros. The steps go to an emitter: one appends nodes to a graph
(:mod:`passes.adapt.insert_adapters`), the other runs operators at once (:mod:`passes.adapt.apply_adapters`), so both
compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from passes.adapt.emit_rescaled import emit_rescaled, emit_without_bias, shape_factor
from passes.forms.base import Call, Emitter, Value
from passes.planning.plan import PlannedAdapter
from passes.planning.site import AdapterSite

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedUse:
    """One use of an adapted weight, whole.

    Attributes:
        kind: ``product``, ``stack``, ``lookup`` or ``convolution``, see :class:`passes.analysis.weight_uses.GraphUse`.
        call: the operator and its arguments.
        x: what it reads beside the weight.
        output: what it returns.
        reverse: a product in the other direction than the site says, or a product x Wₑ of a stack.
    """

    kind: str
    call: Call
    x: Value
    output: Value
    reverse: bool


def fits_activations(kind: str, adapter: PlannedAdapter, *, reverse: bool) -> bool:
    """Whether an adapter can run on what a use reads. A convolution with no kernels left has no operator."""
    if adapter.rank == 0 and kind == "convolution":
        return False
    is_reverse = kind == "product" and reverse
    if adapter.form.rescales:
        # W' in the other direction scales x and not y, so that x W, which is there, is of no use.
        return not is_reverse and kind != "stack"
    return adapter.site.rows is None or (kind == "product" and not is_reverse)


def emit_update(
    emitter: Emitter,
    use: AdaptedUse,
    adapter: PlannedAdapter,
    parameters: Mapping[str, Value],
    factor: Value | None = None,
) -> Value:
    """What is to be added to the use's output, in the output's dtype.

    Args:
        emitter: takes the steps.
        use: the use; :func:`fits_activations` has said that it fits.
        adapter: the adapter.
        parameters: its parameters by name.
        factor: c, [out], where the form rescales.
    """
    update = _emit_form(emitter, use, adapter, parameters)
    if factor is not None:
        factor = shape_factor(emitter, use.kind, use.call, factor, adapter)
        base = emit_without_bias(emitter, use.kind, use.call, use.output, adapter)
        update = emit_rescaled(emitter, base, update, factor)
    if find_dtype(use.output) != adapter.dtype:
        update = emitter.emit(aten.type_as.default, update, use.output)
    return update


def _emit_form(emitter: Emitter, use: AdaptedUse, adapter: PlannedAdapter, parameters: Mapping[str, Value]) -> Value:
    form, scale, shape = adapter.form, adapter.scale, adapter.site.shape
    if use.kind == "lookup":
        return form.emit_lookup(emitter, use.call, parameters, scale)
    x = use.x
    if find_dtype(x) not in (adapter.dtype, None):
        x = emitter.emit(aten.to.dtype, x, adapter.dtype)
    if use.kind == "stack":
        return form.emit_stack(emitter, use.call, x, parameters, scale, shape, reverse=use.reverse)
    if use.kind == "convolution":
        return form.emit_convolution(emitter, use.call, x, parameters, scale, shape)
    update = form.emit_activation(emitter, x, parameters, scale, reverse=use.reverse)
    if adapter.site.rows is None:
        return update
    return emitter.emit(aten.constant_pad_nd.default, update, find_padding(adapter.site))


def find_padding(site: AdapterSite) -> list[int]:
    """How many rows of the weight stand before and behind those of the site."""
    first, end = site.rows or (0, site.weight_rows)
    return [first, site.weight_rows - end]


def find_dtype(value: Value) -> torch.dtype | None:
    """The dtype of a tensor, or of the one that a node stands for; ``None`` where it is not known."""
    example = value if isinstance(value, torch.Tensor) else value.meta.get("val")
    return example.dtype if isinstance(example, torch.Tensor) else None

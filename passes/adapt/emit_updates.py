"""The update that an adapter adds to the output of an operator that uses its weight, in a graph or eagerly.

    y = x Wᵀ, x W (product), x Wₑ, x Wₑᵀ (stack)      →   form(x), or reversed
    y = W[x] (lookup), y = x ∗ W (convolution)         →   form(x)
    a form that rescales, W' = c ∘ (W + ΔW)            →   (c - 1) ∘ (y - b) + c ∘ form(x)

The update of an adapter for some rows of W is padded with zeros. The operators go to an emitter, which either appends
nodes to a graph (:mod:`passes.adapt.insert_adapters`) or runs them (:mod:`passes.adapt.apply_adapters`), so both
compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from passes.adapt.emit_rescaled import emit_rescaled, emit_without_bias, shape_factor
from passes.forms.base import Call, Emitter, Value
from passes.forms.routed import ROUTER
from passes.planning.plan import PlannedAdapter
from passes.planning.site import AdapterSite

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedUse:
    """One operator that uses a whole adapted weight.

    Attributes:
        kind: ``product``, ``stack``, ``lookup`` or ``convolution``, see :class:`passes.analysis.weight_uses.GraphUse`.
        call: the operator and its arguments.
        x: its operand besides the weight.
        output: its result.
        reverse: whether a product has the opposite direction to the site's, or a product of a stack is x Wₑ.
    """

    kind: str
    call: Call
    x: Value
    output: Value
    reverse: bool


def fits_activations(kind: str, adapter: PlannedAdapter, *, reverse: bool) -> bool:
    """Whether an adapter can run on the activations that a use reads; torch has no convolution with 0 kernels."""
    if adapter.rank == 0 and kind == "convolution":
        return False
    is_reverse = kind == "product" and reverse
    if adapter.form.is_routed and (kind != "product" or (is_reverse and ROUTER in adapter.parameter_shapes)):
        return False  # a router reads x [..., in], and gates belong to tokens
    if kind == "lookup" and reverse:
        return False  # PEFT's DoRA of embeddings: its rows are the columns of the stored weight
    if adapter.form.rescales:
        # In the reverse direction c scales x, not y, so the computed output x W cannot be used.
        return not is_reverse and kind != "stack"
    return adapter.site.rows is None or (kind == "product" and not is_reverse)


def emit_update(
    emitter: Emitter,
    use: AdaptedUse,
    adapter: PlannedAdapter,
    parameters: Mapping[str, Value],
    factor: Value | None = None,
) -> Value:
    """The update to add to the use's output, in the shape and dtype of that output.

    Args:
        emitter: runs the operators or appends them to a graph.
        use: the use; :func:`fits_activations` must be true for it.
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
    """The number of the weight's rows before and after those of the site."""
    first, end = site.rows or (0, site.weight_rows)
    return [first, site.weight_rows - end]


def find_dtype(value: Value) -> torch.dtype | None:
    """The dtype of a tensor, or of a node's value; ``None`` if it is unknown."""
    example = value if isinstance(value, torch.Tensor) else value.meta.get("val")
    return example.dtype if isinstance(example, torch.Tensor) else None

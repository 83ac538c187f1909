"""Adapters whose update depends on the call: the gates of a mixture of experts, and masks of tokens.

    a site with a router    computes gates from its own input, and keeps them for the sites that use them
    a site that follows     uses the gates that its leader has computed in this call
    a masked site           uses the mask that the model was called with; without one, it adds nothing

Gates belong to tokens, so the input of a site must have the leading dimensions of its gates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.model.dispatch.scope import find_gates, note_gates
from adapter_compiler.model.dispatch.slots import RoutedAdapter
from passes.adapt.apply_adapters import BoundAdapter
from passes.compat import find_backward_number
from passes.forms.routed import GATES, ROUTER, MaskedForm, MixtureForm


def route(adapters: tuple[BoundAdapter, ...], x: torch.Tensor, *, is_transposed: bool) -> tuple[BoundAdapter, ...]:
    """The adapters with their gates for the input x of a product; those that add nothing are left out.

    Args:
        adapters: the adapters of a weight.
        x: [..., in] or, if the product is the reverse one of the site, [..., out].
        is_transposed: whether the product is x W and not x Wᵀ.

    Raises:
        SiteError: there are no gates for x, or they belong to other tokens, or a router would get the output of its
            layer.
    """
    if not any(isinstance(one, RoutedAdapter) for one in adapters):
        return adapters
    for one in adapters:
        if ROUTER in one.parameters and is_transposed != one.planned.site.transposed:
            one.planned.assert_matrix()
    routed = [_route_one(one, x) if isinstance(one, RoutedAdapter) else one for one in adapters]
    return tuple(one for one in routed if one is not None)


def _route_one(adapter: RoutedAdapter, x: torch.Tensor) -> BoundAdapter | None:
    form, site = adapter.planned.form, adapter.planned.site.name
    if isinstance(form, MaskedForm):
        gates = _find_mask(adapter, form, x)
        if gates is None:
            return None
    elif isinstance(form, MixtureForm):
        gates = _follow(adapter, form, x) if form.leader else _lead(adapter, form, x)
    else:
        raise SiteError(f"site {site} has the form {form.name!r}, expected a mixture or a masked form")
    return dataclasses.replace(adapter, parameters={**adapter.parameters, GATES: gates})


def _lead(adapter: RoutedAdapter, form: MixtureForm, x: torch.Tensor) -> torch.Tensor:
    """The gates by the site's own router, [..., experts], which are kept for the sites that follow."""
    router = adapter.parameters[ROUTER]
    if form.per_example and x.dim() < 3:
        rows = x
    else:
        rows = x.mean(dim=tuple(range(1, x.dim() - 1))) if form.per_example else x
    with _in_full_precision(x):
        probabilities = torch.nn.functional.linear(rows.to(router.dtype), router).softmax(-1)
    gates, chosen = choose_experts(probabilities, form.top_k)
    token = adapter.token
    if token.recorder is not None:
        token.recorder(adapter.planned.site.name, rows.detach(), router, probabilities.detach(), chosen)
    if adapter.is_followed:
        note_gates(token, adapter.planned.site.name, gates)
    return _spread(gates, form, x)


def choose_experts(probabilities: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of experts, and which experts are chosen, both [..., experts].

    With ``top_k=0`` the gates are the probabilities (soft routing), and the most probable expert counts as chosen. With
    1 the gate is the probability of the chosen expert (Switch Transformer, arXiv 2101.03961, equation 2), so that the
    router has a gradient. With more, the probabilities of the chosen experts are divided by their sum.

    Args:
        probabilities: of the router, [..., experts].
        top_k: how many experts to choose; 0 for all.
    """
    indices = probabilities.topk(max(top_k, 1), dim=-1).indices
    chosen = torch.zeros_like(probabilities).scatter(-1, indices, 1.0)
    if not top_k:
        return probabilities, chosen
    gates = probabilities * chosen
    return (gates if top_k == 1 else gates / gates.sum(-1, keepdim=True)), chosen


def _follow(adapter: RoutedAdapter, form: MixtureForm, x: torch.Tensor) -> torch.Tensor:
    site, gates = adapter.planned.site.name, find_gates(adapter.token, form.leader)
    if gates is None:
        raise SiteError(
            f"site {site} takes its gates from {form.leader}, which has not run before it in this "
            f"{'backward' if find_backward_number() >= 0 else 'call'}; expected it to run first; use "
            f"Mixture(router='site'), or leave {site} out{_CHECKPOINT}"
        )
    expected = tuple(gates.shape[:1] if form.per_example else gates.shape[:-1])
    found = tuple(x.shape[:1] if form.per_example else x.shape[:-1])
    if found != expected:
        raise SiteError(
            f"site {site} has an input of shape {tuple(x.shape)}, the gates of {form.leader} are for {expected}; "
            "expected the same leading dimensions, because gates belong to tokens; use Mixture(router='site'), or "
            "leave the site out"
        )
    return _spread(gates, form, x)


def _spread(gates: torch.Tensor, form: MixtureForm, x: torch.Tensor) -> torch.Tensor:
    """Gates for the tokens of x; those of examples apply to all tokens of an example."""
    if not form.per_example or gates.dim() == x.dim():
        return gates
    return gates.reshape(gates.shape[0], *[1] * (x.dim() - 2), gates.shape[-1])


def _find_mask(adapter: RoutedAdapter, form: MaskedForm, x: torch.Tensor) -> torch.Tensor | None:
    """The mask as gates [..., 1] for the tokens of x; ``None`` if the call has no mask."""
    site, kept = adapter.planned.site.name, find_gates(adapter.token, form.argument)
    if kept is None and find_backward_number() >= 0:
        raise SiteError(
            f"site {site} runs again in a backward, where the mask {form.argument!r} of its call is not known; "
            f"expected the forward of the model{_CHECKPOINT}"
        )
    mask: torch.Tensor | None = None if kept is None else kept[0]
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(x.shape[:-1]):
        raise SiteError(
            f"site {site} has an input of shape {tuple(x.shape)}, the mask {form.argument!r} has the shape "
            f"{tuple(mask.shape)}; expected {tuple(x.shape[:-1])}, a value for each token; leave the site out if its "
            "input has other tokens"
        )
    return mask.to(adapter.planned.dtype).unsqueeze(-1)


_CHECKPOINT = (
    ". For activations that are computed again in backward, use AdapterConfig(checkpoint=True) in place of the model's "
    "own checkpoints"
)


@functools.cache
def make_masked_forward(forward: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """A ``forward`` that keeps the mask among its arguments for the weights that are read meanwhile."""
    signature = inspect.signature(forward)

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        token = module.__dict__[MASKING]
        given = signature.bind_partial(module, *args, **kwargs).arguments.get(argument)
        before = find_gates(token, argument)
        note_gates(token, argument, (_check_mask(given, argument),))
        try:
            return forward(module, *args, **kwargs)
        finally:
            note_gates(token, argument, before)

    return run


#: The attribute in which the module that gets the mask keeps the model's token.
MASKING = "_adapter_compiler_masking"


def _check_mask(mask: object, argument: str) -> torch.Tensor | None:
    if mask is None or isinstance(mask, torch.Tensor):
        return mask
    raise ConfigError(
        f"the mask {argument!r} is a {type(mask).__name__}, expected a tensor with a value for each token, or None"
    )


def _in_full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Routers compute in the dtype of the adapter also under autocast (Switch Transformer, section 2.4)."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext()

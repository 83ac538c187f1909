"""Shrink adapters during training: parameters, gradients and optimizer state.

The Parameter objects stay the same and only their contents change, so the optimizer's groups, their order and the
user's loop need no change. All checks run before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.parameters.flat_buffers import Key
from adapter_compiler.errors import BudgetError
from passes.planning.compact_plan import Kept, compact_plan, find_rank_dimensions


def compact_adapters(adapted: AdapterState, kept: Kept, *optimizers: torch.optim.Optimizer) -> None:
    """Keep only the ``kept`` triplets of each site.

    Outputs stay the same within rounding if λ is 0 at the removed triplets. A site that keeps no triplet stays in the
    plan with rank 0, and its weight reads as W.

    Args:
        adapted: the model whose active adapter shrinks; sites that ``kept`` does not name are not changed.
        kept: the indices of the triplets to keep, ascending, by site.
        optimizers: the optimizers that hold the adapter's parameters.

    Raises:
        BudgetError: a parameter is sharded, or the optimizer keeps a state tensor that cannot be cut.
        SiteError: a site does not have one of the indices.
    """
    plan = compact_plan(adapted.plan, kept)
    parameters = adapted.adapters.keyed_parameters
    values: dict[Key, torch.Tensor] = {}
    gradients: dict[Key, torch.Tensor | None] = {}
    states: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for adapter in adapted.plan:
        site = adapter.site.name
        if site not in kept:
            continue
        for name, dimension in find_rank_dimensions(adapter).items():
            parameter = parameters[site, name]
            _assert_plain(site, name, parameter)
            index = kept[site].to(parameter.device)
            values[site, name] = parameter.detach().index_select(dimension, index)
            gradients[site, name] = None if parameter.grad is None else parameter.grad.index_select(dimension, index)
            for optimizer in optimizers:
                states += _cut_state(optimizer, parameter, f"{site}.{name}", dimension, index)
    for state, entry, tensor in states:
        state[entry] = tensor
    adapted.adapters.resize(values)
    for key, gradient in gradients.items():
        parameters[key].grad = gradient
    adapted.adapters.assign_gradient_flags(adapter for adapter in plan if not adapter.rank)
    forget_empty(optimizers, parameters.values())
    adapted.rebuild(plan)


def forget_empty(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[torch.Tensor]) -> None:
    """Remove the empty parameters of adapters of rank 0 from optimizers.

    They do not require grad, so an optimizer that is made later from the trainable parameters does not have them
    either, and the states of both optimizers match.
    """
    empty = {id(parameter) for parameter in parameters if not parameter.numel() and not parameter.requires_grad}
    for optimizer in optimizers if empty else ():
        for group in optimizer.param_groups:
            for parameter in [one for one in group["params"] if id(one) in empty]:
                optimizer.state.pop(parameter, None)
            group["params"][:] = [one for one in group["params"] if id(one) not in empty]


def forget_other_shapes(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[torch.Tensor]) -> None:
    """Delete the optimizer state of parameters whose shape has changed."""
    for optimizer in optimizers:
        for parameter in parameters:
            tensors = [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, torch.Tensor)]
            if any(t.dim() == parameter.dim() and t.shape != parameter.shape for t in tensors):
                del optimizer.state[parameter]


def _cut_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, where: str, dimension: int, index: torch.Tensor
) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """The cut optimizer state of one parameter: the state's dict, the key in it, and the cut tensor.

    Raises:
        BudgetError: a state tensor has neither the parameter's shape nor that of a row or column of it.
    """
    state = optimizer.state.get(parameter, {})
    cut = []
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
            found = _match_dimension(tensor, parameter, dimension, key)
            if found is None:
                raise BudgetError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} for {where} of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut to fewer triplets; expected state of the "
                    "parameter's shape or of a row or column of it"
                )
            if found.dimension is not None:
                cut.append((state, key, tensor.index_select(found.dimension, index.to(tensor.device))))
    return cut


class _Match:
    """The dimension of a state tensor that counts triplets; ``None`` if no dimension does.

    The row sums of a factored optimizer (Adafactor) are an example of a state without such a dimension.
    """

    def __init__(self, dimension: int | None) -> None:
        self.dimension = dimension


def _match_dimension(tensor: torch.Tensor, parameter: torch.Tensor, dimension: int, key: str) -> _Match | None:
    """Compare a state tensor with its parameter: the same shape, or with reduced dimensions (of size 1 or missing)."""
    shape, ranks = tensor.shape, parameter.dim()
    position = ranks + dimension
    if tensor.dim() == ranks and all(a in (b, 1) for a, b in zip(shape, parameter.shape, strict=True)):
        return _Match(position if shape[position] == parameter.shape[position] else None)
    if tensor.dim() != ranks - 1:
        return None
    without = [d for d in (ranks - 1, ranks - 2) if (*parameter.shape[:d], *parameter.shape[d + 1 :]) == shape]
    if len(without) == 2:
        # The parameter is square: a factored optimizer's "row" state lacks the columns, its "col" state the rows.
        without = [ranks - 2 if "col" in key else ranks - 1]
    if not without:
        return None
    if without[0] == position:
        return _Match(None)
    return _Match(position - (without[0] < position))


def _assert_plain(site: str, name: str, parameter: torch.Tensor) -> None:
    if type(parameter) is not torch.nn.Parameter:
        raise BudgetError(
            f"site {site}: {name} is a {type(parameter).__name__}; expected an ordinary parameter. Sharded "
            "adapters cannot shrink while they train; gather the model first"
        )

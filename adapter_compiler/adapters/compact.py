"""Shrink adapters while they train: parameters, gradients and optimizer state, in place of the same objects.

Parameters keep their identity, so that the optimizer's groups, their order and the user's loop stay as
they are. What cannot be cut is found before anything is changed.
"""

from __future__ import annotations

from typing import Any

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.parameters.flat_buffers import Key
from adapter_compiler.errors import BudgetError
from passes.adapt.compact_ranks import Kept, compact_plan, find_rank_dimensions


def compact_adapters(adapted: AdapterState, kept: Kept, *optimizers: torch.optim.Optimizer) -> None:
    """Keep only the ``kept`` triplets of each site.

    Outputs stay the same within rounding if λ is 0 at the others. Sites that keep nothing leave the graphs
    but stay in the plan with rank 0.

    Args:
        adapted: whose adapters shrink; sites that ``kept`` does not name stay as they are.
        kept: by site, ascending indices.
        optimizers: those that hold the adapters.

    Raises:
        BudgetError: a parameter is sharded, or the optimizer keeps a state that cannot be cut.
        SiteError: an index that a site does not have.
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
    for holder, key, tensor in states:
        holder[key] = tensor
    adapted.adapters.resize(values)
    for one, gradient in gradients.items():
        parameters[one].grad = gradient
    adapted.rebuild(plan)


def _cut_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, where: str, dimension: int, index: torch.Tensor
) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """What is kept of an optimizer's tensors for one parameter: where it belongs, and the tensor."""
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
    """Where a state has the triplets; ``None`` if it has none, as the row sums of a factored optimizer."""

    def __init__(self, dimension: int | None) -> None:
        self.dimension = dimension


def _match_dimension(tensor: torch.Tensor, parameter: torch.Tensor, dimension: int, key: str) -> _Match | None:
    """Match a state to the parameter: the same shape, with sizes of 1 for reduced dimensions, or without them."""
    shape, ranks = tensor.shape, parameter.dim()
    position = ranks + dimension
    if tensor.dim() == ranks and all(a in (b, 1) for a, b in zip(shape, parameter.shape, strict=True)):
        return _Match(position if shape[position] == parameter.shape[position] else None)
    if tensor.dim() != ranks - 1:
        return None
    without = [d for d in (ranks - 1, ranks - 2) if (*parameter.shape[:d], *parameter.shape[d + 1 :]) == shape]
    if len(without) == 2:
        # A square parameter: a factored optimizer's "row" has lost the columns, its "col" the rows.
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

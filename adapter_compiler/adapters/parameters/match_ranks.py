"""The ranks and starts that a state dict was saved with.

A run that had removed pruned triplets has smaller ranks; one that started from data has starting values, which a model
that was just compiled does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from passes.forms import with_offset
from passes.forms.offset import START
from passes.planning.compact_plan import find_rank_dimensions
from passes.planning.plan import AdapterPlan, PlannedAdapter


def match_ranks(plan: AdapterPlan, initial: AdapterPlan, state: Mapping[str, Any], prefix: str) -> AdapterPlan | None:
    """The plan with the ranks and starts that the adapters of a state dict have, or ``None`` if it has them already.

    Ranks above the initial ones are ignored, so that loading refuses them: the scale belongs to the initial rank.

    Args:
        plan: the present plan.
        initial: the plan with the initial ranks.
        state: the state dict; sites that are not in it keep their ranks.
        prefix: the part of the keys before the names of the sites.
    """
    pairs = zip(plan, initial, strict=True)
    adapters = tuple(_match_one(now, first.rank, state, f"{prefix}{now.site.name}.") for now, first in pairs)
    return None if adapters == plan.adapters else AdapterPlan(adapters=adapters)


def _match_one(adapter: PlannedAdapter, most: int, state: Mapping[str, Any], prefix: str) -> PlannedAdapter:
    """The adapter with the rank and the start that make all its parameters fit the state, if there are such."""
    shapes = _find_shapes(adapter, state, prefix)
    dimensions = find_rank_dimensions(adapter)
    ranks = {name: shape[dimensions[name]] for name, shape in shapes.items() if _has_rank(shape, dimensions.get(name))}
    starts = {name: shape for name, shape in shapes.items() if name.endswith(START)}
    form = adapter.form
    for name, shape in starts.items():
        dimension = dimensions.get(name.removesuffix(START))
        if dimension is not None and _has_rank(shape, dimension):
            form = with_offset(form, shape[dimension])
            break
    for rank in sorted(set(ranks.values())):
        if rank > most:
            continue
        fitted = dataclasses.replace(adapter, form=form, rank=rank)
        if all(fitted.parameter_shapes.get(name) == shape for name, shape in shapes.items()):
            return fitted
    return adapter


def _find_shapes(adapter: PlannedAdapter, state: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's parameters, and of starting values, that the state has."""
    names = [name for own in adapter.parameter_shapes for name in (own, own + START)]
    found = {name: state.get(prefix + name) for name in names}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, torch.Tensor)}


def _has_rank(shape: tuple[int, ...], dimension: int | None) -> bool:
    return dimension is not None and len(shape) >= -dimension

"""Ranks by site before training, from a look at data: an alternative to pruning while it goes on.

eva        the components of all layers' inputs with the greatest explained variance (arXiv 2410.07170)
gora       in proportion to mean |W ∘ G| over √(in + out), by largest remainders (arXiv 2502.12171)
gradient   the largest singular values of all weights' gradients
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adapter_compiler.config.validation import assert_choice, assert_integer
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import Loss, as_batches, assert_adapted, find_weight_gradients
from adapter_compiler.training.calibration.start_from_data import decompose_layer_inputs
from adapter_compiler.training.scoring.allocator import Request, allocate_best, share_out
from passes.planning.plan import AdapterPlan

#: What ``StaticAllocation(method=...)`` may name.
METHODS = ("eva", "gora", "gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticAllocation:
    """How ranks are given out before training.

    Attributes:
        method: ``"eva"``, ``"gora"`` or ``"gradient"``.
        total: the sum of all ranks, met exactly; by default that of the plan there is.
        min_rank: what each site gets at least; sites that get 0 carry no adapter.
        max_rank: what each site gets at most; by default twice its present rank (EVA's ρ = 2). A weight's smaller
            dimension bounds it as well.
        at_once: how many gradients memory may hold, see :class:`~adapter_compiler.DataStart`.

    Raises:
        ConfigError: a value cannot work.
    """

    method: str = dataclasses.field(metadata={"example": "eva"})
    total: int | None = None
    min_rank: int = 0
    max_rank: int | None = None
    at_once: int = 1

    def __post_init__(self) -> None:
        assert_choice(self, "method", METHODS)
        assert_integer(self, "min_rank", least=0)
        assert_integer(self, "at_once", least=1)
        for name in ("total", "max_rank"):
            if getattr(self, name) is not None:
                assert_integer(self, name, least=1)


def allocate_ranks(
    adapted: AdaptedModel, allocation: StaticAllocation | str, batches: Iterable[Any], loss: Loss
) -> AdapterPlan:
    """The model's plan with other ranks, for ``compile_with_adapters(model, plan=...)``. The model is not changed.

    Scales stay as they are planned.

    Args:
        adapted: the model, before training, in the mode that it is to be looked at in.
        allocation: the method by name, or with options.
        batches: a few of them, each what ``loss`` takes.
        loss: ``loss(model, batch)`` gives the loss; for ``"eva"`` it is enough that it calls the model.

    Raises:
        ConfigError: the model is not adapted, the total cannot be met within the bounds, or there is no batch.
        SiteError: the loss does not depend on a weight, or its inputs are not to be had.
    """
    options = allocation if isinstance(allocation, StaticAllocation) else StaticAllocation(method=allocation)
    assert_adapted(adapted, "allocate_ranks")
    plan = list(adapted.plan)
    total = sum(adapter.rank for adapter in plan) if options.total is None else options.total
    high = [
        min(adapter.site.largest_rank, 2 * adapter.rank if options.max_rank is None else options.max_rank)
        for adapter in plan
    ]
    low = [min(options.min_rank, most) for most in high]
    if not sum(low) <= total <= sum(high):
        raise ConfigError(
            f"StaticAllocation: a total of {total} does not lie between the least and greatest ranks of all "
            f"{len(plan)} sites, {sum(low)} and {sum(high)}; change total, min_rank or max_rank"
        )
    collected = as_batches(batches)
    if options.method == "gora":
        ranks = share_out(total, _weigh(adapted, options, collected, loss), [1] * len(plan), low, high)
    else:
        find = _explain_inputs if options.method == "eva" else _find_singular_values
        ranks = _take_best(find(adapted, options, collected, loss, high), total, low, high)
    adapters = [dataclasses.replace(a, rank=rank, form=a.form.core) for a, rank in zip(plan, ranks, strict=True)]
    return AdapterPlan(adapters=tuple(adapters))


def _explain_inputs(
    adapted: AdaptedModel, options: StaticAllocation, batches: Sequence[Any], loss: Loss, high: Sequence[int]
) -> list[torch.Tensor]:
    counts = {adapter.site.name: most for adapter, most in zip(adapted.plan, high, strict=True)}
    found = decompose_layer_inputs(adapted, batches, loss, counts)
    return [found[adapter.site.name].explained for adapter in adapted.plan]


def _find_singular_values(
    adapted: AdaptedModel, options: StaticAllocation, batches: Sequence[Any], loss: Loss, high: Sequence[int]
) -> list[torch.Tensor]:
    found = find_weight_gradients(adapted, batches, loss, at_once=options.at_once)
    return [torch.linalg.svdvals(g.to(torch.promote_types(g.dtype, torch.float32))) for _, g in found]


def _weigh(adapted: AdaptedModel, options: StaticAllocation, batches: Sequence[Any], loss: Loss) -> list[float]:
    """Mean |W ∘ G| over √(in + out) of each site."""
    importance = []
    for adapter, gradient in find_weight_gradients(adapted, batches, loss, at_once=options.at_once):
        weight = adapter.site.to_matrix(adapted.base_weight(adapter.site.weight).detach())
        mean = float((weight * gradient).abs().float().mean())
        importance.append(mean / math.sqrt(adapter.site.out_features + adapter.site.in_features))
    return importance


def _take_best(scores: Sequence[torch.Tensor], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """How many of each site's scores are among the best; a site with fewer scores than its bound has zeros."""
    padded = []
    for values, most in zip(scores, high, strict=True):
        row = torch.zeros(most, dtype=torch.float64)
        row[: len(values)] = values[:most].double().cpu()
        padded.append(row)
    request = Request(
        scores=torch.cat(padded),
        sizes=list(high),
        budget=total,
        costs=[1] * len(high),
        low=low,
        high=high,
    )
    return [int(part.sum()) for part in allocate_best(request).split(list(high))]

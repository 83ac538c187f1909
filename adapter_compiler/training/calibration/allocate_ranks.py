"""Choose the rank of each site from data before training, as an alternative to pruning during training.

eva        by the largest shares of explained variance over the inputs of all layers (arXiv 2410.07170)
gora       in proportion to mean |W ∘ G| / √(in + out), by the largest-remainder method (arXiv 2502.12171)
gradient   by the largest singular values over the gradients of all weights
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adapter_compiler.config.progress import progress
from adapter_compiler.config.validation import assert_choice, assert_integer
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import (
    Loss,
    as_batches,
    assert_adapted,
    assert_matrices,
    find_weight_gradients,
)
from adapter_compiler.training.calibration.start_from_data import decompose_layer_inputs
from adapter_compiler.training.scoring.allocator import Request, allocate_best, share_out
from passes.planning.plan import AdapterPlan

#: The values of ``StaticAllocation(method=...)``.
METHODS = ("eva", "gora", "gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticAllocation:
    """The options of choosing ranks before training.

    Attributes:
        method: ``"eva"``, ``"gora"`` or ``"gradient"``.
        total: the exact sum of all ranks; by default that of the present plan.
        min_rank: the least rank of each site; a site of rank 0 gets no adapter.
        max_rank: the largest rank of each site; by default twice its present rank (EVA's ρ = 2). A rank is also at most
            the weight's smaller dimension.
        at_once: the number of gradients in memory at once, see :class:`~adapter_compiler.DataStart`.

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

    The scales of the plan do not change.

    Args:
        adapted: the model, before training; it runs in its present training mode.
        allocation: the method's name, or the options.
        batches: a few batches, in the form that ``loss`` takes.
        loss: ``loss(model, batch)`` returns the loss of a batch; for ``"eva"`` it only needs to call the model.

    Raises:
        ConfigError: the model is not adapted, the total is outside the bounds, or there is no batch.
        SiteError: the loss does not depend on a weight, or no operator with the weight was seen (``"eva"``).
    """
    options = allocation if isinstance(allocation, StaticAllocation) else StaticAllocation(method=allocation)
    assert_adapted(adapted, "allocate_ranks")
    assert_matrices(adapted, "allocate_ranks")
    plan = list(adapted.plan)
    total = sum(adapter.rank for adapter in plan) if options.total is None else options.total
    high = [
        min(adapter.site.largest_rank, 2 * adapter.rank if options.max_rank is None else options.max_rank)
        for adapter in plan
    ]
    low = [min(options.min_rank, most) for most in high]
    if not sum(low) <= total <= sum(high):
        raise ConfigError(
            f"StaticAllocation: the total is {total}, expected a number from {sum(low)} to {sum(high)}, the sums of "
            f"the least and largest ranks of all {len(plan)} sites; change total, min_rank or max_rank"
        )
    collected = as_batches(batches)
    with progress(f"allocate ranks by {options.method}"):
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
    """The importance of each site in GoRA: mean |W ∘ G| / √(in + out)."""
    importance = []
    for adapter, gradient in find_weight_gradients(adapted, batches, loss, at_once=options.at_once):
        weight = adapter.site.to_matrix(adapted.base_weight(adapter.site.weight).detach())
        mean = float((weight * gradient).abs().float().mean())
        importance.append(mean / math.sqrt(adapter.site.out_features + adapter.site.in_features))
    return importance


def _take_best(scores: Sequence[torch.Tensor], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """The number of each site's scores that are among the ``total`` best; missing scores count as zero."""
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

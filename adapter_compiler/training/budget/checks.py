"""Checks that a budget fits its model and its optimizers, with error texts and warnings."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import torch

from adapter_compiler.errors import BudgetError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from passes.planning.plan import PlannedAdapter

logger = logging.getLogger(__name__)

#: The number of steps without a gradient after which sites are reported.
_PATIENCE = 3


class GradientWatch:
    """Warns once if adapters get no gradient for some steps, with possible causes."""

    def __init__(self, adapted: AdaptedModel) -> None:
        """Watch the adapters of ``adapted``."""
        self._adapted = adapted
        self._steps = 0
        self._done = False

    def check(self, triplets: TripletBuffers, step: int) -> None:
        """Check the gradients of one step, and warn if it is due."""
        if self._done:
            return
        if all(p.grad is not None or not p.numel() for p in triplets.parameters.values()):
            self._steps = 0
            return
        self._steps += 1
        if self._steps == _PATIENCE:
            self._done = True
            empty = [site for site in triplets.sites if _has_no_gradient(triplets, site)]
            logger.warning(
                "%d of %d sites had no gradient for %d steps until step %d (first: %s): %s",
                len(empty),
                len(triplets.sites),
                _PATIENCE,
                step,
                empty[0],
                self._explain(),
            )

    def _explain(self) -> str:
        if not self._adapted.was_called:
            return "the adapted model was not called; compute the loss with it and not with the original model"
        return (
            "the loss does not depend on it, or something stops its gradient: look for detach() or no_grad between the "
            "model's output and the loss, for zero_grad() between backward() and step(), and for a checkpoint with "
            "use_reentrant=True whose inputs do not require grad (use_reentrant=False needs none); if no call uses "
            "the weight, exclude it from the sites"
        )


def _has_no_gradient(triplets: TripletBuffers, site: str) -> bool:
    parameters = [triplets.parameters[site, name] for name in ("lam", "P", "Q")]
    return any(p.grad is None and p.numel() for p in parameters)


def assert_reachable(
    schedule: BudgetSchedule, sites: Sequence[str], least: Sequence[int], costs: Sequence[int], target: int
) -> None:
    """Raise :class:`BudgetError` unless the target pays for a triplet, and for those that every site keeps.

    Args:
        schedule: the schedule, for messages.
        sites: the names of the sites.
        least: by site, how many triplets it keeps at least.
        costs: by site, what a triplet costs in the unit of the budget.
        target: bT.
    """
    option = "target_parameters" if schedule.counts_parameters else "target_rank"
    given = f"BudgetSchedule({option}={getattr(schedule, option):g})"
    if target < min(costs):
        cheapest = sites[costs.index(min(costs))]
        raise BudgetError(
            f"{given} is below the cost of one triplet, which is {min(costs)} at {cheapest} and no less elsewhere; "
            f"expected at least {min(costs)}; raise it"
        )
    needed = sum(number * cost for number, cost in zip(least, costs, strict=True))
    if needed > target:
        unit = "parameters" if schedule.counts_parameters else "triplets"
        raise BudgetError(
            f"Allocation(min_rank={schedule.allocation.min_rank}) keeps {needed} {unit} over {len(sites)} sites, "
            f"{given} leaves {target}; expected at most that; lower min_rank or raise {option}"
        )


def assert_kinds(adapted: object, schedule: object) -> AdaptedModel:
    """Check the types of a budget's arguments.

    Returns:
        The adapted model.

    Raises:
        BudgetError: an argument has the wrong type.
    """
    if not isinstance(schedule, BudgetSchedule):
        raise BudgetError(
            f"RankBudget(schedule=...) is a {type(schedule).__name__}, expected BudgetSchedule; give "
            "BudgetSchedule(target_rank=..., total_steps=...)"
        )
    if not isinstance(adapted, AdaptedModel):
        raise BudgetError(
            f"RankBudget(adapted=...) is a {type(adapted).__name__}, expected AdaptedModel; give what "
            "compile_with_adapters returned"
        )
    return adapted


def assert_active(adapted: AdaptedModel, name: str) -> None:
    """Raise :class:`BudgetError` unless the adapter that a budget prunes is the active one."""
    if adapted.active_adapter != name:
        raise BudgetError(
            f"this budget prunes the adapter {name!r}, but {adapted.active_adapter!r} is active; expected the same. "
            f"Call use({name!r}) before the step, or make an optimizer and a budget for the other adapter"
        )


def warn_of_shifted_starts(adapted: AdaptedModel) -> None:
    """Warn if adapters start at ΔW ≠ 0, because pruning then removes parts of the original weights."""
    prunable = _find_prunable(adapted)
    shifted = [adapter.site.name for adapter in prunable if adapter.form.name != adapter.form.core.name]
    if shifted:
        logger.warning(
            "%d of %d sites start from a part of the weight itself (pissa, lora_ga; first: %s): pruning a triplet "
            "removes its part from the weight. Start from 'orthogonal', 'gradient_svd' or 'eva' to prune, or train "
            "without a RankBudget",
            len(shifted),
            len(prunable),
            shifted[0],
        )


def assert_fits(adapted: AdaptedModel, optimizers: Sequence[torch.optim.Optimizer], schedule: BudgetSchedule) -> None:
    """Raise :class:`BudgetError` unless the optimizers hold all adapters and the target is within their ranks."""
    prunable = _find_prunable(adapted)
    if not prunable:
        kinds = ", ".join(sorted({adapter.form.name for adapter in adapted.plan}))
        raise BudgetError(
            f"the adapters are of the kind {kinds}, which has no λ and cannot be pruned, expected triplets P, λ, Q at "
            "one site or more; compile with AdapterConfig(kind='svd') or kind='dora-svd', or train without a RankBudget"
        )
    if schedule.compact and (grouped := [adapter for adapter in prunable if adapter.form.groups > 1]):
        raise BudgetError(
            f"BudgetSchedule(compact=True) would leave the {grouped[0].form.groups} experts of {grouped[0].site.name} "
            "with different ranks, expected compact=False for a mixture, in which pruned triplets stay in memory"
        )
    names = {adapter.site.name for adapter in prunable}
    if others := [adapter.site.name for adapter in adapted.plan if adapter.site.name not in names]:
        logger.warning(
            "%d of %d sites have no λ (first: %s); their ranks do not change, and the budget is for the other sites",
            len(others),
            len(adapted.plan),
            others[0],
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    missing = [
        adapter.site.name
        for adapter in prunable
        if not all(id(p) in held for p in adapted.adapters.parameters_of(adapter).values() if p.requires_grad)
    ]
    if missing:
        others = [name for name in adapted.adapter_names if _is_held(adapted, name, held)]
        hint = f"it holds the adapter {others[0]!r}, but {adapted.active_adapter!r} is active; " if others else ""
        raise BudgetError(
            f"the optimizer does not hold the adapters of {len(missing)} of {len(prunable)} sites "
            f"(first: {missing[0]}), expected all of them; {hint}make it from adapted.trainable_parameters()"
        )
    initial = sum(adapter.rank for adapter in prunable)
    if schedule.target_rank is not None and schedule.target_triplets(len(prunable), initial) < 1:
        raise BudgetError(
            f"BudgetSchedule(target_rank={schedule.target_rank:g}) times {len(prunable)} sites leaves no triplet; "
            f"expected at least {1 / len(prunable):g}; raise it"
        )
    largest = max(adapter.rank for adapter in prunable)
    if schedule.target_rank is not None and schedule.target_rank > largest:
        raise BudgetError(
            f"BudgetSchedule(target_rank={schedule.target_rank:g}) exceeds the rank {largest} that the adapters "
            f"start with; expected at most {largest}; lower it or compile with AdapterConfig(rank=...) above it"
        )


def _find_prunable(adapted: AdaptedModel) -> list[PlannedAdapter]:
    """The adapters with λ."""
    sites = set(adapted.adapters.prunable_sites)
    return [adapter for adapter in adapted.plan if adapter.site.name in sites]


def _is_held(adapted: AdaptedModel, name: str, held: Collection[int]) -> bool:
    """Whether all parameters of an adapter are among those with these ids."""
    return all(id(parameter) in held for parameter in adapted.parameters_of_adapter(name).parameters())

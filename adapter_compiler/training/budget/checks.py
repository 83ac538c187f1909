"""What can be wrong between a budget, its model and its optimizer, and how it is said."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import torch

from adapter_compiler.errors import BudgetError, NonFiniteGradientError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.scoring.distributed import gather_full
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from passes.planning.plan import PlannedAdapter

logger = logging.getLogger(__name__)

_LETTERS = {"lam": "λ", "P": "P", "Q": "Q"}

#: Steps without gradient after which a site is reported.
_PATIENCE = 3


class GradientWatch:
    """Says once when adapters get no gradient for some steps, and why that may be."""

    def __init__(self, adapted: AdaptedModel) -> None:
        """Watch the adapters of ``adapted``."""
        self._adapted = adapted
        self._steps = 0
        self._done = False

    def look(self, triplets: TripletBuffers, step: int) -> None:
        """Look at the gradients of one step."""
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
            return "the adapted model was not called; compute the loss with it and not with the model it was made from"
        return (
            "the loss does not depend on it, or its gradient was cut off: look for detach() or no_grad between the "
            "model's output and the loss, and for zero_grad() between backward() and step(); exclude a weight that no "
            "call uses from the sites"
        )


def _has_no_gradient(triplets: TripletBuffers, site: str) -> bool:
    parameters = [triplets.parameters[site, name] for name in ("lam", "P", "Q")]
    return any(p.grad is None and p.numel() for p in parameters)


def assert_finite(triplets: TripletBuffers, gradients: Sequence[torch.Tensor], step: int) -> None:
    """Raise :class:`NonFiniteGradientError`, naming the site, if a gradient has inf or nan."""
    # A sum is one fast kernel; where finite gradients overflow it, the look at each parameter finds nothing.
    sums = [gather_full(g.sum()).float() for g in gradients]
    if bool(torch.isfinite(sum((s.to(sums[0].device) for s in sums[1:]), start=sums[0]))):
        return
    for (site, name), p in triplets.parameters.items():
        if p.grad is not None and not bool(torch.isfinite(gather_full(p.grad)).all()):
            raise NonFiniteGradientError(
                f"site {site}: the gradient of {_LETTERS[name]} has inf or nan at step {step}, expected "
                "finite values; nothing was changed. Lower the learning rate, clip the gradients, or use a "
                "GradScaler, which skips such steps"
            )


def assert_kinds(adapted: object, optimizer: object, schedule: object) -> None:
    """Raise :class:`BudgetError` unless each is of its kind."""
    expected: list[tuple[str, object, type, str]] = [
        ("adapted", adapted, AdaptedModel, "what compile_with_adapters returned"),
        ("optimizer", optimizer, torch.optim.Optimizer, "one over adapted.trainable_parameters()"),
        ("schedule", schedule, BudgetSchedule, "BudgetSchedule(target_rank=..., total_steps=...)"),
    ]
    for name, value, kind, hint in expected:
        if not isinstance(value, kind):
            raise BudgetError(
                f"RankBudget({name}=...) is a {type(value).__name__}, expected {kind.__name__}; give {hint}"
            )


def assert_active(adapted: AdaptedModel, name: str) -> None:
    """Raise :class:`BudgetError` unless the adapter that a budget prunes is the active one."""
    if adapted.active_adapter != name:
        raise BudgetError(
            f"this budget prunes the adapter {name!r}, but {adapted.active_adapter!r} is active; expected the same. "
            f"Call use({name!r}) before the step, or make an optimizer and a budget for the other adapter"
        )


def warn_of_shifted_starts(adapted: AdaptedModel) -> None:
    """Say that pruning takes parts of the weights away where adapters do not start at P = 0 or λ = 0."""
    prunable = _find_prunable(adapted)
    shifted = [adapter.site.name for adapter in prunable if adapter.form.name != adapter.form.core.name]
    if shifted:
        logger.warning(
            "%d of %d sites start from a part of the weight itself (pissa, lora_ga; first: %s): a triplet that is "
            "pruned takes its part out of the weight. Start from 'orthogonal', 'gradient_svd' or 'eva' to prune, or "
            "train without a RankBudget",
            len(shifted),
            len(prunable),
            shifted[0],
        )


def assert_fits(adapted: AdaptedModel, optimizer: torch.optim.Optimizer, schedule: BudgetSchedule) -> None:
    """Raise :class:`BudgetError` unless the optimizer holds all adapters and the target is within their ranks."""
    prunable = _find_prunable(adapted)
    if not prunable:
        kinds = ", ".join(sorted({adapter.form.name for adapter in adapted.plan}))
        raise BudgetError(
            f"the adapters are of the kind {kinds}, which has no λ to prune by, expected triplets P, λ, Q at one site "
            "at least; compile with AdapterConfig(kind='svd') or kind='dora-svd', or train without a RankBudget"
        )
    names = {adapter.site.name for adapter in prunable}
    if others := [adapter.site.name for adapter in adapted.plan if adapter.site.name not in names]:
        logger.warning(
            "%d of %d sites have no λ (first: %s); their ranks stay, and the budget is for the others",
            len(others),
            len(adapted.plan),
            others[0],
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
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
    """The adapters that have a λ."""
    sites = set(adapted.adapters.prunable_sites)
    return [adapter for adapter in adapted.plan if adapter.site.name in sites]


def _is_held(adapted: AdaptedModel, name: str, held: Collection[int]) -> bool:
    """Whether an optimizer that holds parameters of these ids holds all of an adapter."""
    return all(id(parameter) in held for parameter in adapted.parameters_of_adapter(name).parameters())

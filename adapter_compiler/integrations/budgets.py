"""What the callbacks have in common: they find the adapted model and make the budget when the loop says its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from adapter_compiler.errors import BudgetError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget import BudgetSchedule, MaskingRecord, RankBudget


class BudgetMaker:
    """The options of a budget but the number of steps, which the training loop knows."""

    def __init__(self, options: dict[str, Any], observers: Sequence[Callable[[MaskingRecord], None]]) -> None:
        """Check the options.

        Raises:
            ConfigError: ``total_steps`` is among them, or an option cannot work whatever it is.
        """
        if given := sorted({"total_steps", "total_step"} & options.keys()):
            raise ConfigError(
                f"{given[0]}={options[given[0]]!r}: expected no number of steps: the training loop says it; leave "
                "it out, and give warmup_steps, final_steps and interval as you like"
            )
        self._options, self._observers = dict(options), list(observers)

    def make(self, adapted: AdaptedModel, optimizers: Sequence[Any], total_steps: int) -> RankBudget:
        """The budget for a loop of so many optimizer steps.

        Raises:
            BudgetError: as of :class:`~adapter_compiler.RankBudget`.
            ConfigError: an option cannot work for this number of steps.
        """
        schedule = BudgetSchedule(total_steps=total_steps, **self._options)
        return RankBudget(adapted, list(optimizers), schedule, observers=self._observers)


def find_adapted(model: object, callback: str) -> AdaptedModel:
    """The one adapted model in a module, whatever is around it.

    Raises:
        BudgetError: there is none, or more than one.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    found = [part for part in parts if isinstance(part, AdaptedModel)]
    if len(found) != 1:
        raise BudgetError(
            f"{callback}: {len(found)} adapted models are in the {type(model).__name__} that is trained, expected one; "
            "put what compile_with_adapters returned into it"
        )
    return found[0]


def summarize(budget: RankBudget) -> dict[str, float]:
    """Numbers for a logger: the budget, what lives of it, and the rank of each site."""
    ranks = budget.ranks()
    values = {"budget": budget.budget, "live_triplets": budget.live_triplets}
    values |= {f"rank/{site}": rank for site, rank in ranks.items()}
    return {f"adapters/{name}": float(value) for name, value in values.items()}

"""A budget and its model as the plain data of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from adapter_compiler.adapters.combine import compress_triplets
from adapter_compiler.adapters.parameters.factors import factor_triplets
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.masking_record import MaskingRecord
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.run_report.run_data import MaskingData, RunData, SiteData
from passes.planning.plan import PlannedAdapter


class HasHistory(Protocol):
    """The part of a :class:`~adapter_compiler.RankBudget` that a report shows."""

    schedule: BudgetSchedule
    step: int
    history: list[MaskingRecord]

    @property
    def live_parameters(self) -> int:
        """The number of parameters in the live triplets."""

    @property
    def is_frozen(self) -> bool:
        """Whether the set of live triplets is fixed."""

    def ranks(self) -> dict[str, int]:
        """The number of live triplets of each site."""


#: The scores of the live and of the pruned triplets, by site.
Scores = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]


def collect_run(
    budget: HasHistory, adapted: AdaptedModel, name: str, scores: Scores, *, losses: Sequence[float], title: str
) -> RunData:
    """The data of a run.

    Args:
        budget: its budget.
        adapted: its model.
        name: the adapter that the budget belongs to.
        scores: the scores at the last masking; empty if they are not known.
        losses: the loss of each step, or nothing.
        title: the heading.
    """
    present = {adapter.site.name: adapter for adapter in adapted.adapter_set.plans[name]}
    before = {adapter.site.name: adapter.rank for adapter in adapted.adapter_set.initial_plan(name)}
    unknown = "The scores of the last masking are not in memory any more, after compaction or a resumed run."
    notes = (unknown,) if budget.history and not scores else ()
    return RunData(
        title=title,
        sites=[
            SiteData(
                name=site,
                block=find_block(site),
                role=adapter.site.role or "",
                shape=tuple(adapter.site.shape),
                before=before[site],
                after=budget.ranks().get(site, adapter.rank),
                singular_values=find_singular_values(adapted, name, adapter),
                scores=scores.get(site, ((), ()))[0],
                pruned_scores=scores.get(site, ((), ()))[1],
            )
            for site, adapter in present.items()
        ],
        maskings=[
            MaskingData(step=one.step, budget=one.budget, live=one.live, ranks=one.ranks, loss=one.loss)
            for one in budget.history
        ],
        step=budget.step,
        total_steps=budget.schedule.total_steps,
        metric=budget.schedule.allocation.metric,
        unit="parameters" if budget.schedule.counts_parameters else "triplets",
        parameters=budget.live_parameters,
        is_frozen=budget.is_frozen,
        losses=tuple(float(loss) for loss in losses),
        notes=notes,
    )


def find_singular_values(adapted: AdaptedModel, name: str, adapter: PlannedAdapter) -> tuple[float, ...]:
    """The singular values of ΔW, as many as the rank; nothing for stacks of matrices and mixtures."""
    parameters = adapted.parameters_of_adapter(name).parameters_of(adapter)
    if not adapter.rank or adapter.form.is_routed or any(parameter.dim() > 2 for parameter in parameters.values()):
        return ()
    P, lam, Q = factor_triplets(adapter, parameters)
    _, values, _ = compress_triplets((P, lam * adapter.scale, Q), adapter.rank)
    return (*values.tolist(), *[0.0] * (adapter.rank - len(values)))


def find_block(name: str) -> str:
    """The part of a weight's name up to the first number, as in ``encoder.layers.3``; empty without a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[: first + 1])


def split_scores(sites: Sequence[str], sizes: Sequence[int], scores: torch.Tensor | None, mask: torch.Tensor) -> Scores:
    """Scores of all triplets as those of live and of pruned ones, by site; nothing if they belong to other triplets."""
    if scores is None or len(scores) != len(mask):
        return {}
    parts = zip(sites, scores.detach().cpu().split(list(sizes)), mask.cpu().split(list(sizes)), strict=True)
    return {site: (tuple(part[live].tolist()), tuple(part[~live].tolist())) for site, part, live in parts}

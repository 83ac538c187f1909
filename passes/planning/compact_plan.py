"""Remove pruned triplets from a plan: fewer columns of P, elements of λ and rows of Q.

    P [.., d1, r], λ [.., r], Q [.., r, d2], kept i1 < … < ik   →   P[.., i], λ[.., i], Q[.., i, :]
    a site that keeps no triplet                                →   rank 0, no adapter

With λ = 0 at every removed triplet the outputs stay the same within rounding, because the scale s does not depend on
the rank. Graphs are not rewritten: calls run the model's own Python, and graphs that are captured later use the new
plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from passes.base import SiteError
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: By site, the indices [k] of the triplets to keep, ascending.
Kept = Mapping[str, torch.Tensor]


def compact_plan(plan: AdapterPlan, kept: Kept) -> AdapterPlan:
    """The plan with the ranks that remain; scales do not change.

    Args:
        plan: the plan before pruning.
        kept: the triplets to keep; sites that it does not name keep all.

    Raises:
        SiteError: a site is not in the plan, indices are not ascending or not below the site's rank, or a mixture would
            lose triplets.
    """
    if unknown := sorted(kept.keys() - {adapter.site.name for adapter in plan}):
        raise SiteError(f"no adapter is planned for {', '.join(unknown)}; expected sites of the plan")
    adapters = []
    for adapter in plan:
        indices = kept.get(adapter.site.name)
        if indices is not None:
            _assert_indices(adapter, indices.tolist())
            _assert_ungrouped(adapter, len(indices))
            adapter = dataclasses.replace(adapter, rank=len(indices))
        adapters.append(adapter)
    return AdapterPlan(adapters=tuple(adapters))


def find_rank_dimensions(adapter: PlannedAdapter) -> dict[str, int]:
    """By parameter, the dimension (from the end) whose size is the rank; parameters without one are omitted."""
    site = adapter.site
    one, two = (adapter.form.parameter_shapes(site.out_features, site.in_features, rank) for rank in (1, 2))
    found = {}
    for name, shape in one.items():
        differing = [i - len(shape) for i, size in enumerate(shape) if size != two[name][i]]
        if differing:
            found[name] = differing[0]
    return found


def _assert_indices(adapter: PlannedAdapter, indices: list[int]) -> None:
    if indices != sorted(set(indices)) or any(not 0 <= i < adapter.rank for i in indices):
        raise SiteError(
            f"site {adapter.site.name}: cannot keep triplets {indices}; expected ascending indices below {adapter.rank}"
        )


def _assert_ungrouped(adapter: PlannedAdapter, rank: int) -> None:
    if adapter.form.groups > 1 and rank != adapter.rank:
        raise SiteError(
            f"site {adapter.site.name}: the {adapter.rank} triplets of {adapter.form.name!r} belong to "
            f"{adapter.form.groups} experts of equal rank, so {adapter.rank - rank} of them cannot be removed; "
            "expected all to stay; leave pruned ones in memory (compact=False)"
        )

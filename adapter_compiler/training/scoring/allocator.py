"""Choose the live triplets for a budget: by score over all sites, or by a rank for each site first.

Ties are broken by order (site, then triplet), so all processes and all runs choose the same triplets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The input of an allocator. Vectors have one entry for each of the n triplets, site by site.

    Attributes:
        scores: the score of each triplet, [n].
        sizes: the number of triplets of each site.
        budget: the budget, in triplets or parameters.
        costs: the cost of one triplet of each site, in the unit of the budget.
        low: the least number of triplets that each site keeps.
        high: the largest number of triplets that each site keeps.
        preferred: triplets that are chosen before all others, except those for ``low``; [n] of bool.
    """

    scores: torch.Tensor
    sizes: Sequence[int]
    budget: int
    costs: Sequence[int]
    low: Sequence[int]
    high: Sequence[int]
    preferred: torch.Tensor | None = None

    def by_triplet(self, values: Sequence[int]) -> torch.Tensor:
        """Repeat a value for each site for all of its triplets, [n]."""
        sizes = torch.tensor(list(self.sizes), device=self.scores.device)
        return torch.tensor(list(values), device=self.scores.device).repeat_interleave(sizes)

    def positions(self) -> torch.Tensor:
        """The position of each triplet within its site, [n]: 0 for the best, 1 for the second, and so on."""
        order = self.order()
        site = self.by_triplet(range(len(self.sizes)))
        by_site = order[torch.sort(site[order], stable=True).indices]
        positions = torch.empty_like(by_site)
        positions[by_site] = torch.cat([torch.arange(size) for size in self.sizes]).to(positions)
        return positions

    def order(self) -> torch.Tensor:
        """The indices of the triplets from the best to the worst, [n]."""
        order = torch.sort(self.scores, descending=True, stable=True).indices
        if self.preferred is None:
            return order
        return order[torch.sort(self.preferred[order].to(torch.int8), descending=True, stable=True).indices]


@torch.no_grad()
def allocate_best(request: Request) -> torch.Tensor:
    """The mask, [n] of bool, of the triplets with the largest scores over all sites.

    If all triplets cost 1, exactly ``budget`` of them live, or as many as ``high`` allows. If costs differ, triplets
    are taken in the order of score divided by cost, as long as they fit into the budget.
    """
    positions = request.positions()
    costs = request.by_triplet(request.costs)
    by_cost = dataclasses.replace(request, scores=request.scores / costs) if len(set(request.costs)) > 1 else request
    order = by_cost.order()
    order = order[(positions < request.by_triplet(request.high))[order]]
    is_optional = (positions >= request.by_triplet(request.low))[order]
    order = order[torch.sort(is_optional.to(torch.int8), stable=True).indices]
    mask = torch.zeros_like(positions, dtype=torch.bool)
    mask[_spend(order, costs, request.budget)] = True
    return mask


@torch.no_grad()
def allocate_by_site(request: Request, importance: Sequence[float]) -> torch.Tensor:
    """The mask, [n] of bool, of the best triplets in each site, with ranks in proportion to ``importance``."""
    ranks = share_out(request.budget, importance, request.costs, request.low, request.high)
    return request.positions() < request.by_triplet(ranks)


def share_out(
    budget: int, importance: Sequence[float], costs: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Distribute a budget over sites in proportion to their importance, by the largest-remainder method.

    The rank of site l is r_l = clip(budget · s_l / (cost_l · Σ s), low_l, high_l), rounded such that
    Σ r_l · cost_l ≤ budget. If rounding or ``high`` leaves a part of the budget, it goes to the sites whose rank is
    furthest below their share. If ``low`` makes the sum too large, triplets are taken from the sites whose rank is
    furthest above their share.

    Args:
        budget: the budget.
        importance: s_l of each site; if all are 0, the sites are equally important.
        costs: the cost of one triplet of each site.
        low: the least rank of each site.
        high: the largest rank of each site.

    Returns:
        The rank of each site.
    """
    total = sum(importance)
    shares = [s / total for s in importance] if total > 0 else [1 / len(importance)] * len(importance)
    quotas = [budget * share / cost for share, cost in zip(shares, costs, strict=True)]
    ranks = [min(max(math.floor(q), a), b) for q, a, b in zip(quotas, low, high, strict=True)]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    while left < 0:
        can = [i for i, rank in enumerate(ranks) if rank > low[i]]
        if not can:
            break
        most = max(can, key=lambda i: (ranks[i] - quotas[i], -i))
        ranks[most] -= 1
        left += costs[most]
    while True:
        can = [i for i, rank in enumerate(ranks) if rank < high[i] and costs[i] <= left]
        if not can:
            return ranks
        least = max(can, key=lambda i: (quotas[i] - ranks[i], -i))
        ranks[least] += 1
        left -= costs[least]


def choose_grown(growth: torch.Tensor, live: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` pruned triplets with the largest growth score, as a mask [n] of bool."""
    order = torch.sort(growth.masked_fill(live, -math.inf), descending=True, stable=True).indices
    grown = torch.zeros_like(live)
    grown[order[: min(count, int((~live).sum()))]] = True
    return grown


def _spend(order: torch.Tensor, costs: torch.Tensor, budget: int) -> torch.Tensor:
    """The indices of the triplets that fit into the budget, taken in order."""
    spent = costs[order].cumsum(0)
    fits = spent <= budget
    if bool(fits.all()) or len(costs.unique()) == 1:
        return order[fits]
    taken, left = [], budget
    for index, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if cost <= left:
            taken.append(index)
            left -= cost
    return torch.tensor(taken, dtype=torch.long, device=order.device)

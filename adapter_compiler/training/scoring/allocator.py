"""Give a budget to the triplets: by score over all sites, or by site first.

Equal scores are settled by order (site, then triplet), so every rank and every run agrees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What an allocator decides from. Vectors run over all triplets, site by site.

    Attributes:
        scores: what each triplet is worth, [n].
        sizes: how many triplets each site has.
        budget: what may be spent.
        costs: what a triplet of each site costs.
        low: triplets that each site keeps at least.
        high: triplets that each site keeps at most.
        preferred: triplets that come before all others but those of ``low``, [n] of bool.
    """

    scores: torch.Tensor
    sizes: Sequence[int]
    budget: int
    costs: Sequence[int]
    low: Sequence[int]
    high: Sequence[int]
    preferred: torch.Tensor | None = None

    def by_triplet(self, values: Sequence[int]) -> torch.Tensor:
        """A value for each site as one for each of its triplets."""
        sizes = torch.tensor(list(self.sizes), device=self.scores.device)
        return torch.tensor(list(values), device=self.scores.device).repeat_interleave(sizes)

    def places(self) -> torch.Tensor:
        """0 for the best triplet of its site, 1 for the next and so on, [n]."""
        order = self.order()
        site = self.by_triplet(range(len(self.sizes)))
        by_site = order[torch.sort(site[order], stable=True).indices]
        places = torch.empty_like(by_site)
        places[by_site] = torch.cat([torch.arange(size) for size in self.sizes]).to(places)
        return places

    def order(self) -> torch.Tensor:
        """Triplets from the best to the worst."""
        order = torch.sort(self.scores, descending=True, stable=True).indices
        if self.preferred is None:
            return order
        return order[torch.sort(self.preferred[order].to(torch.int8), descending=True, stable=True).indices]


@torch.no_grad()
def allocate_best(request: Request) -> torch.Tensor:
    """The mask, [n] of bool, of the triplets with the greatest scores over all sites.

    Where every triplet costs 1 exactly ``budget`` of them live, or as many as ``high`` allows. Where costs
    differ, triplets are taken by score over cost as long as they fit.
    """
    places = request.places()
    costs = request.by_triplet(request.costs)
    worth = dataclasses.replace(request, scores=request.scores / costs) if len(set(request.costs)) > 1 else request
    order = worth.order()
    order = order[(places < request.by_triplet(request.high))[order]]
    is_spare = (places >= request.by_triplet(request.low))[order]
    order = order[torch.sort(is_spare.to(torch.int8), stable=True).indices]
    mask = torch.zeros_like(places, dtype=torch.bool)
    mask[_spend(order, costs, request.budget)] = True
    return mask


@torch.no_grad()
def allocate_by_site(request: Request, importance: Sequence[float]) -> torch.Tensor:
    """The mask, [n] of bool, of the best triplets in each site, with ranks in proportion to ``importance``."""
    ranks = share_out(request.budget, importance, request.costs, request.low, request.high)
    return request.places() < request.by_triplet(ranks)


def share_out(
    budget: int, importance: Sequence[float], costs: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Ranks r_l = clip(budget · s_l / Σ s, low, high) by largest remainders, with Σ r_l · cost_l ≤ budget exactly.

    What clipping and rounding leave over goes to the sites that miss most of their share, as long as one
    can take it; what clipping up has overspent is taken from those that exceed their share most.
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
    """The ``count`` pruned triplets with the greatest growth score, as a mask [n] of bool."""
    order = torch.sort(growth.masked_fill(live, -math.inf), descending=True, stable=True).indices
    grown = torch.zeros_like(live)
    grown[order[: min(count, int((~live).sum()))]] = True
    return grown


def _spend(order: torch.Tensor, costs: torch.Tensor, budget: int) -> torch.Tensor:
    """The triplets that fit into the budget, taken in order."""
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

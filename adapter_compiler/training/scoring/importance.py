"""The importance of a site: how much it changes its weight, as a smoothed ‖ΔW‖_F."""

from __future__ import annotations

import torch

from adapter_compiler.adapters.parameters.sharded import gather_full
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from passes.planning.plan import AdapterPlan


class SiteImportance:
    """The importance of each site, s_l ← β s_l + (1 - β)‖ΔW_l‖_F, updated at each masking.

    Attributes:
        values: s_l of each site.
    """

    def __init__(self, sites: int, beta: float) -> None:
        """Start with zeros."""
        self.beta = beta
        self.values = [0.0] * sites

    def update(self, triplets: TripletBuffers, plan: AdapterPlan) -> list[float]:
        """Update s with the present norms, and return it."""
        scales = {adapter.site.name: adapter.scale for adapter in plan}
        norms = measure_update_norms(triplets)
        now = [scales[site] * norms[site] for site in triplets.sites]
        self.values = [self.beta * s + (1 - self.beta) * n for s, n in zip(self.values, now, strict=True)]
        return self.values


@torch.no_grad()
def measure_update_norms(triplets: TripletBuffers) -> dict[str, float]:
    """‖P diag(λ) Q‖_F by site, without the scale s.

    ‖P diag(λ) Q‖² = Σ_ij λ_i λ_j (PᵀP)_ij (QQᵀ)_ij needs matrices of r × r instead of d1 × d2.
    """
    parts: dict[tuple[str, str], torch.Tensor] = {}
    for stack in triplets.stacks:
        values = stack.view(triplets.values)
        if stack.name != "lam":
            values = values.mT @ values if stack.name == "P" else values @ values.mT
        parts.update(zip(stack.keys, gather_full(values).double().unbind(), strict=True))
    squares = {}
    for site in triplets.sites:
        lam = parts[site, "lam"]
        products = parts[site, "P"] * parts[site, "Q"] * lam.unsqueeze(-1) * lam.unsqueeze(-2)
        squares[site] = products.sum().clamp_min(0)
    return {site: float(square.sqrt()) for site, square in squares.items()}

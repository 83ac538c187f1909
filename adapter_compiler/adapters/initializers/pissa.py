"""PiSSA: start with the largest singular triplets of the weight itself (Meng et al. 2024, arXiv 2404.02948)."""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.config.start_options import PISSA_NAME, StartOptions
from passes.planning.plan import PlannedAdapter


def draw_pissa(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """With W = U S Vᵀ, start at ΔW₀ = U_r S_r V_rᵀ, which includes the scale s, as in PEFT (the paper has s = 1)."""
    matched = PISSA_NAME.match(options.name or "pissa")
    assert matched is not None
    if matched["iterations"] is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, turned = torch.svd_lowrank(weight, adapter.rank, niter=int(matched["iterations"]))
        right = turned.t()
    rank = adapter.rank
    return StartingFactors(left=left[:, :rank], right=right[:rank], values=values[:rank] / adapter.scale)

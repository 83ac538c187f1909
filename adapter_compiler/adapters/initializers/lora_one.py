"""LoRA-One: start with one step along the gradient (Zhang et al. 2025, arXiv 2502.01235).

With −G = U S Vᵀ, take P = η U_r diag(S / S₀), λ = 1, Q = V_rᵀ. Then ΔW = −s η G_r / S₀, where G_r is the best
approximation of rank r to the gradient and S₀ its largest singular value: the first step is taken, and the frozen
weight does not change. So triplets can be pruned, unlike those of LoRA-GA and PiSSA; the model's outputs do change.
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.adapters.initializers.gradient_svd import decompose
from passes.planning.plan import PlannedAdapter


def draw_lora_one(
    adapter: PlannedAdapter, gradient: torch.Tensor, *, step_size: float, iterations: int | None = None
) -> tuple[StartingFactors, torch.Tensor]:
    """The factors, and σ [r].

    Args:
        adapter: the plan for the site.
        gradient: G, [out, in].
        step_size: η, the largest singular value of ΔW / s.
        iterations: the number of power iterations of a randomized decomposition; by default the decomposition is exact.
    """
    left, values, right = decompose(-gradient, adapter.rank, iterations)
    shares = values / values[:1].clamp_min(torch.finfo(values.dtype).tiny)
    return StartingFactors(left=step_size * left * shares, right=right, values=torch.ones_like(values)), values

"""LoRA-GA: let the first step of LoRA go where full fine-tuning would (Wang et al. 2024, arXiv 2407.05000).

With G = ∂L/∂W = U Σ Vᵀ, both factors come from the singular vectors of G, those of one from the first r and those of
the other from the next r, so that ΔW after one step has rank 2r and is the best such approximation of a multiple of
G (theorem 3.1). Both are multiplied by d_out^(1/4)/√γ (theorem 3.2), and s B₀A₀ is taken out of the frozen weight.

PEFT departs from the paper: it scales B alone, and by the singular values too.
"""

from __future__ import annotations

import math

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.adapters.initializers.gradient_svd import decompose
from passes.planning.plan import PlannedAdapter


def draw_lora_ga(
    adapter: PlannedAdapter, gradient: torch.Tensor, *, stable_gamma: float = 16.0, iterations: int | None = None
) -> tuple[StartingFactors, float]:
    """The factors, and the share of ‖G‖² that ΔW of rank 2r cannot follow, Σ_{i>2r} σ_i² / ‖G‖² (Eckart-Young).

    Args:
        adapter: the plan for the site.
        gradient: G as [out, in].
        stable_gamma: γ.
        iterations: power iterations of a randomized decomposition; exact by default.
    """
    rank = adapter.rank
    left, values, right = decompose(gradient, 2 * rank, iterations)
    # A small weight has fewer than 2r singular vectors; those of B and of A then overlap.
    first = left.shape[1] - rank
    size = adapter.site.out_features**0.25 / math.sqrt(stable_gamma)
    total = float(gradient.square().sum())
    kept = float(values.square().sum())
    factors = StartingFactors(
        left=left[:, first : first + rank], right=right[:rank], values=values.new_full((rank,), size**2)
    )
    return factors, max(0.0, 1 - kept / total) if total else 0.0

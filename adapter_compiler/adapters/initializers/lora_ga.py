"""LoRA-GA: make LoRA's first step close to that of full fine-tuning (Wang et al. 2024, arXiv 2407.05000).

With G = ∂L/∂W = U Σ Vᵀ, one factor is made of the first r singular vectors of G and the other factor of the next r.
Then ΔW after one step has rank 2r and is the best approximation of this rank to a multiple of G (theorem 3.1). Both
factors are multiplied by d_out^(1/4)/√γ (theorem 3.2), and s B₀A₀ is subtracted from the frozen weight.

PEFT differs from the paper: it scales B only, and also by the singular values.
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
    """The factors, and the share of ‖G‖² that a ΔW of rank 2r cannot represent.

    By Eckart-Young this share is Σ_{i>2r} σ_i² / ‖G‖².

    Args:
        adapter: the plan for the site.
        gradient: G, [out, in].
        stable_gamma: γ of theorem 3.2.
        iterations: the number of power iterations of a randomized decomposition; by default the decomposition is exact.
    """
    rank = adapter.rank
    left, values, right = decompose(gradient, 2 * rank, iterations)
    # A small weight has fewer than 2r singular vectors; B and A then share some of them.
    first = left.shape[1] - rank
    size = adapter.site.out_features**0.25 / math.sqrt(stable_gamma)
    total = float(gradient.square().sum())
    kept = float(values.square().sum())
    factors = StartingFactors(
        left=left[:, first : first + rank], right=right[:rank], values=values.new_full((rank,), size**2)
    )
    return factors, max(0.0, 1 - kept / total) if total else 0.0

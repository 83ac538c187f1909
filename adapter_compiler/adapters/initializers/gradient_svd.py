"""Start the SVD form along the gradient of the weight.

With G = ∂L/∂W = U Σ Vᵀ, take P = U_r, Q = V_rᵀ, λ = 0. Then ΔW = 0, so the frozen weight does not change;
PᵀP = QQᵀ = I holds exactly; and ∂L/∂λ_i = s σ_i is as large as possible for orthonormal P and Q (von Neumann's trace
inequality). The σ_i of all sites are an initial ranking of triplets. With sign(G) in place of G, the start is along
Adam's first step instead of the gradient.
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from passes.planning.plan import PlannedAdapter


def draw_gradient_svd(
    adapter: PlannedAdapter, gradient: torch.Tensor, *, iterations: int | None = None
) -> tuple[StartingFactors, torch.Tensor]:
    """The factors, and σ [r].

    Args:
        adapter: the plan for the site.
        gradient: G or sign(G), [out, in].
        iterations: the number of power iterations of a randomized decomposition; by default the decomposition is exact.
    """
    left, values, right = decompose(gradient, adapter.rank, iterations)
    return StartingFactors(left=left, right=right), values


def decompose(
    matrix: torch.Tensor, rank: int, iterations: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], σ [r] and Vᵀ [r, in]; exact, or randomized with power ``iterations`` (Halko et al. 2011)."""
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        oversampled = min(2 * rank, *matrix.shape)
        left, values, turned = torch.svd_lowrank(matrix, oversampled, niter=iterations)
        right = turned.t()
    return left[:, :rank], values[:rank], right[:rank]

"""Start the SVD form along the gradient of the weight.

With G = ∂L/∂W = U Σ Vᵀ take P = U_r, Q = V_rᵀ, λ = 0. Then ΔW = 0 and the frozen weight is untouched, PᵀP = QQᵀ = I
exactly, and ∂L/∂λ_i = s σ_i is as large as it can be for any orthonormal P and Q (von Neumann). The σ of all
sites are a first ranking of triplets. With the sign of G in place of G it is the first step of Adam that is aligned.
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from passes.planning.plan import PlannedAdapter


def draw_gradient_svd(
    adapter: PlannedAdapter, gradient: torch.Tensor, *, iterations: int | None = None
) -> tuple[StartingFactors, torch.Tensor]:
    """The factors, and σ [r], from the gradient as [out, in].

    Args:
        adapter: the plan for the site.
        gradient: G or sign(G).
        iterations: power iterations of a randomized decomposition; exact by default.
    """
    left, values, right = decompose(gradient, adapter.rank, iterations)
    return StartingFactors(left=left, right=right), values


def decompose(
    matrix: torch.Tensor, rank: int, iterations: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], σ [r] and Vᵀ [r, in]; exact, or randomized with that many power iterations (Halko et al. 2011)."""
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        oversampled = min(2 * rank, *matrix.shape)
        left, values, turned = torch.svd_lowrank(matrix, oversampled, niter=iterations)
        right = turned.t()
    return left[:, :rank], values[:rank], right[:rank]

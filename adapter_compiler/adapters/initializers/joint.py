"""Start the adapters of several tasks together: one decomposition of all their gradients, with a shared right factor.

The gradients G_t = ∂L_t/∂W [out, in] of the tasks, each divided by its Frobenius norm, are stacked to a matrix
[tasks · out, in] = U Σ Vᵀ. Q = V_rᵀ is the best shared basis of r directions (Eckart-Young): Σ_t ‖G_t Qᵀ‖² is largest.
P_t is the matrix with orthonormal columns that is nearest to G_t Qᵀ (its polar factor), and λ = 0. Then ΔW = 0 for
every task. With LoRA, A = Q and B_t = 0, and the first step of gradient descent takes B_t along -G_t Qᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.adapters.initializers.gradient_svd import decompose


def draw_joint(
    gradients: Sequence[torch.Tensor], rank: int, *, has_lam: bool
) -> tuple[list[StartingFactors], list[float], torch.Tensor]:
    """The factors of each task, the share of each ‖G_t‖² that is outside of Q, and the singular values σ [r].

    Args:
        gradients: G_t [out, in], one for each task.
        rank: r.
        has_lam: whether the form has λ, so that P_t is drawn; otherwise the left factor is 0.
    """
    norms = [torch.linalg.matrix_norm(gradient) for gradient in gradients]
    scaled = [g / norm if norm > 0 else g for g, norm in zip(gradients, norms, strict=True)]
    _, values, right = decompose(torch.cat(scaled), rank, None)
    factors, left_over = [], []
    for gradient in scaled:
        reached = gradient @ right.mT
        left_over.append(max(0.0, 1 - float(reached.square().sum())) if bool(gradient.any()) else 0.0)
        left = _find_polar_factor(reached) if has_lam else None
        factors.append(StartingFactors(left=left, right=right))
    return factors, left_over, values


def _find_polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found: torch.Tensor = left @ right
    return found

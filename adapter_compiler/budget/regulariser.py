"""The orthogonality regulariser R(P, Q) = ‖PᵀP − I‖² + ‖QQᵀ − I‖² by its closed-form gradient.

Adding the gradient just before the optimizer's step instead of a term to the loss keeps it out of
the evaluation loss, out of gradient clipping, and out of the user's code (arXiv 2303.10512, eq. 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapter_compiler.budget.sensitivity import Triplets


def orthogonality_gap(factor: torch.Tensor) -> torch.Tensor:
    """PᵀP − I for P [d1, r] (pass Qᵀ for QQᵀ − I), [r, r]."""
    gram = factor.T @ factor
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


@torch.no_grad()
def add_regulariser_gradient(
    triplets: Sequence[Triplets], gamma: float, semantics: str, grad_scale: float = 1.0
) -> None:
    """Add the regulariser's gradient to that of each P and Q; parameters without gradient are left alone.

    ``"paper"``: γ Σ ‖·‖²_F, so 4γ P(PᵀP − I) and 4γ (QQᵀ − I)Q. ``"peft"``: γ times the mean over all P and
    Q of ‖·‖_F, so γ/n · 2P(PᵀP − I)/‖PᵀP − I‖_F, and zero where the norm is. ``grad_scale`` multiplies where
    gradients are still scaled.
    """
    count = 2 * len(triplets)
    for _, P, Q in triplets:
        for parameter, factor, is_transposed in ((P, P, False), (Q, Q.T, True)):
            if parameter.grad is None:
                continue
            gap = orthogonality_gap(factor)
            if semantics == "paper":
                gradient = factor @ gap * (4 * gamma * grad_scale)
            else:
                direction = gap / gap.norm().clamp_min(torch.finfo(gap.dtype).tiny)
                gradient = factor @ direction * (2 * gamma * grad_scale / count)
            parameter.grad.add_(gradient.T if is_transposed else gradient)


@torch.no_grad()
def measure_orthogonality(triplets: Sequence[Triplets]) -> float:
    """Σ R(P_k, Q_k) over all sites."""
    gaps = [orthogonality_gap(factor) for _, P, Q in triplets for factor in (P, Q.T)]
    return float(sum(gap.square().sum() for gap in gaps))

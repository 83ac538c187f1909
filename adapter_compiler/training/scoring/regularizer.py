"""The orthogonality regularizer R(P, Q) = ‖PᵀP − I‖² + ‖QQᵀ − I‖² by its closed-form gradient.

Adding the gradient just before the optimizer's step instead of a term to the loss keeps it out of
the evaluation loss, out of gradient clipping, and out of the user's code (arXiv 2303.10512, eq. 4).
Factors of one shape are worked on together, as stacks [n, …, d1, r] or [n, …, r, d2].
"""

from __future__ import annotations

import torch

from adapter_compiler.training.scoring.distributed import gather_full, replicate_like
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers


def orthogonality_gap(factor: torch.Tensor) -> torch.Tensor:
    """PᵀP − I for P [..., d1, r] (pass Qᵀ for QQᵀ − I), [..., r, r]."""
    gram = gather_full(factor.mT @ factor)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


@torch.no_grad()
def add_regularizer_gradient(
    triplets: TripletBuffers,
    gradients: list[torch.Tensor],
    gamma: float,
    semantics: str,
    grad_scale: float = 1.0,
) -> None:
    """Add the regularizer's gradient for every P and Q to buffers from :meth:`TripletBuffers.gather_gradients`.

    ``"paper"``: γ Σ ‖·‖²_F, so 4γ P(PᵀP − I) and 4γ (QQᵀ − I)Q. ``"peft"``: γ times the mean over all P and
    Q of ‖·‖_F, so γ/n · 2P(PᵀP − I)/‖PᵀP − I‖_F, and zero where the norm is. ``grad_scale`` multiplies where
    gradients are still scaled.
    """
    count = 2 * len(triplets.sites)
    for stack in triplets.stacks:
        if stack.name not in ("P", "Q"):
            continue
        values, target = stack.view(triplets.values), stack.view(gradients)
        gap = orthogonality_gap(values if stack.name == "P" else values.mT)
        if semantics == "paper":
            alpha = 4 * gamma * grad_scale
        else:
            alpha = 2 * gamma * grad_scale / count
            gap = gap / _norms(gap)
        _add_product(target, values, replicate_like(gap, values), alpha, from_left=stack.name == "Q")


@torch.no_grad()
def measure_orthogonality(triplets: TripletBuffers) -> float:
    """Σ R(P_k, Q_k) over all sites."""
    factors = [(stack.name, stack.view(triplets.values)) for stack in triplets.stacks if stack.name in ("P", "Q")]
    gaps = [orthogonality_gap(values if name == "P" else values.mT) for name, values in factors]
    return float(sum(float(gap.square().sum()) for gap in gaps))


def _norms(gap: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.matrix_norm(gap, keepdim=True)
    return norms.clamp_min(torch.finfo(gap.dtype).tiny)


def _add_product(
    target: torch.Tensor, values: torch.Tensor, gap: torch.Tensor, alpha: float, *, from_left: bool
) -> None:
    left, right = (gap, values) if from_left else (values, gap)
    if target.dim() == 3 and type(target) is torch.Tensor:
        target.baddbmm_(left, right, alpha=alpha)
    else:
        target.add_(left @ right, alpha=alpha)

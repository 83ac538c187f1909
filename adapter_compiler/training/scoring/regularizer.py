"""The closed-form gradient of the orthogonality regularizer R(P, Q) = ‖PᵀP − I‖² + ‖QQᵀ − I‖².

R is from arXiv 2303.10512, eq. 4. Its gradient is added just before the optimizer's step, in place of a term in the
loss, so that it is not part of the evaluation loss, of gradient clipping, or of the user's code. Factors of one shape
are processed together, as stacks [n, …, d1, r] or [n, …, r, d2].
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.parameters.sharded import gather_full, replicate_like
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers


def orthogonality_gap(factor: torch.Tensor) -> torch.Tensor:
    """The matrix PᵀP − I [..., r, r] for P [..., d1, r]; for QQᵀ − I, pass Qᵀ."""
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
    """Add the regularizer's gradient for every P and Q.

    With ``semantics="paper"`` the term is γ Σ ‖·‖²_F, whose gradients are 4γ P(PᵀP − I) and 4γ (QQᵀ − I)Q. With
    ``"peft"`` it is γ times the mean of ‖·‖_F over all n factors P and Q, whose gradient for P is
    γ/n · 2P(PᵀP − I)/‖PᵀP − I‖_F, and 0 if the norm is 0.

    Args:
        triplets: the parameters.
        gradients: buffers from :meth:`TripletBuffers.gather_gradients`, changed in place.
        gamma: γ.
        semantics: ``"paper"`` or ``"peft"``.
        grad_scale: the factor by which a GradScaler has multiplied the gradients.
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

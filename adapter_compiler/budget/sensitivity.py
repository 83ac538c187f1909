"""Smoothed sensitivity, its uncertainty, and the score of a triplet (arXiv 2303.10512, eqs. 8 to 11)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: The parameters of one site, λ [r], P [d1, r] and Q [r, d2], or values of the same shapes.
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SensitivityTracker:
    """Ī and U of every adapter parameter, in float32 or better.

    Ī·U has the magnitude of (w · ∂L/∂w)², which half precision would round to zero, and then every triplet ties.

    Attributes:
        mean: Ī, one tensor a parameter, in the order λ, P, Q of each site.
        uncertainty: U, in the same order.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], beta1: float, beta2: float) -> None:
        """Start with Ī = U = 0."""
        self.beta1 = beta1
        self.beta2 = beta2
        self.mean = [_zeros_of(p) for p in parameters]
        self.uncertainty = [_zeros_of(p) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """One step of I = |w · ∂L/∂w|, Ī ← β1 Ī + (1 - β1) I, U ← β2 U + (1 - β2)|I - Ī| (with the new Ī).

        A parameter without gradient has I = 0. ``grad_scale`` divides gradients that are still scaled.
        """
        sensitivity = [
            torch.zeros_like(mean) if p.grad is None else (p.to(mean.dtype) * p.grad.to(mean.dtype)).abs_()
            for p, mean in zip(parameters, self.mean, strict=True)
        ]
        if grad_scale != 1.0:
            torch._foreach_div_(sensitivity, grad_scale)
        torch._foreach_mul_(self.mean, self.beta1)
        torch._foreach_add_(self.mean, sensitivity, alpha=1 - self.beta1)
        torch._foreach_sub_(sensitivity, self.mean)
        torch._foreach_abs_(sensitivity)
        torch._foreach_mul_(self.uncertainty, self.beta2)
        torch._foreach_add_(self.uncertainty, sensitivity, alpha=1 - self.beta2)

    @torch.no_grad()
    def triplet_scores(self) -> list[torch.Tensor]:
        """S of each triplet, one tensor [r] a site: s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), s = Ī·U."""
        scores = torch._foreach_mul(self.mean, self.uncertainty)
        return [
            lam + P.mean(dim=0) + Q.mean(dim=1)
            for lam, P, Q in zip(scores[0::3], scores[1::3], scores[2::3], strict=True)
        ]


def _zeros_of(parameter: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

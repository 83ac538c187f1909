"""Orthonormal directions: PᵀP = I and QQᵀ = I from the first step, so that AdaLoRA's regulariser starts at zero.

The start of the forms with λ, in place of the paper's small normal factors: those first have to grow to the length
that the regulariser asks for, and until then λ has gradients that are as much too small (docs/quality.md).
"""

from __future__ import annotations

import torch

from adapter_compiler.initialisers.base import StartingFactors, StartOptions, draw_orthonormal
from passes.plan import PlannedAdapter


def draw_orthogonal(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """Both factors orthonormal, uniformly distributed, ΔW = 0."""
    columns = draw_orthonormal(adapter.site.in_features, adapter.rank, dtype=adapter.dtype, device=weight.device)
    return StartingFactors(left=None, right=columns.mT)

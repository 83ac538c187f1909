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
    site = adapter.site
    columns, left = (
        draw_orthonormal(size, adapter.rank, dtype=adapter.dtype, device=weight.device)
        for size in (site.in_features, site.out_features)
    )
    return StartingFactors(left=left, right=columns.mT)

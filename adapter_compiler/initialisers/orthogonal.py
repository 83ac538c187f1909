"""Orthonormal directions: PᵀP = I and QQᵀ = I from the first step, so that AdaLoRA's regulariser starts at zero."""

from __future__ import annotations

import torch

from adapter_compiler.initialisers.base import StartingFactors, StartOptions
from passes.plan import PlannedAdapter


def draw_orthogonal(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """Both factors orthonormal, uniformly distributed, ΔW = 0."""
    right = torch.empty(adapter.rank, adapter.site.in_features, dtype=weight.dtype, device=weight.device)
    torch.nn.init.orthogonal_(right)
    return StartingFactors(left=None, right=right)

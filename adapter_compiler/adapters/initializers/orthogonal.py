"""LoRA's start with orthonormal directions: QQᵀ = I, and P = 0 with λ = 1, or B = 0.

This is the default start of the forms with λ. In AdaLoRA's paper, λ = 0 between small normal factors. Training then
first learns one number for each triplet, along random directions, and the small factors make its gradient small. Here
P follows the gradient from the first step, as in LoRA, and the rows of Q are orthogonal to each other
(docs/quality.md).
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors, draw_orthonormal
from adapter_compiler.config.start_options import StartOptions
from passes.planning.plan import PlannedAdapter


def draw_orthogonal(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """Draw the right factor with orthonormal rows, uniformly distributed; ΔW = 0."""
    columns = draw_orthonormal(adapter.site.in_features, adapter.rank, dtype=adapter.dtype, device=weight.device)
    return StartingFactors(left=None, right=columns.mT)

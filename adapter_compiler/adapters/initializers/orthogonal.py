"""LoRA's start with directions that are orthonormal: QQᵀ = I, and P = 0 with λ = 1, or B = 0.

The start of the forms with λ. In the paper's, λ is zero between small normal factors: first to be learned is one number
a triplet, along directions that were drawn, with a gradient as much too small as the factors are too short. Here P
turns to where the gradient is from the first step, as in LoRA, and no two rows of Q see the same (docs/quality.md).
"""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors, draw_orthonormal
from adapter_compiler.config.start_options import StartOptions
from passes.planning.plan import PlannedAdapter


def draw_orthogonal(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """The right factor orthonormal, uniformly distributed, ΔW = 0."""
    columns = draw_orthonormal(adapter.site.in_features, adapter.rank, dtype=adapter.dtype, device=weight.device)
    return StartingFactors(left=None, right=columns.mT)

"""The start in AdaLoRA's paper (arXiv 2303.10512, section 3.1): P and Q normal, λ zero; for LoRA, A normal, B zero."""

from __future__ import annotations

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.config.start_options import StartOptions
from passes.planning.plan import PlannedAdapter


def draw_gaussian(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """Draw both factors from N(0, std²) with torch's global generator; ΔW = 0."""
    site = adapter.site
    left = torch.empty(site.out_features, adapter.rank, dtype=adapter.dtype, device=weight.device)
    right = torch.empty(adapter.rank, site.in_features, dtype=adapter.dtype, device=weight.device)
    return StartingFactors(left=left.normal_(0.0, options.std), right=right.normal_(0.0, options.std))

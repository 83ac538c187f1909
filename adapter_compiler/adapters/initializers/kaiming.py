"""The start in the LoRA authors' code and in PEFT: A uniform as in ``nn.Linear``, B zero.

For forms with triplets: Q uniform, P zero and λ = 1.
"""

from __future__ import annotations

import math

import torch

from adapter_compiler.adapters.initializers.base import StartingFactors
from adapter_compiler.config.start_options import StartOptions
from passes.planning.plan import PlannedAdapter


def draw_kaiming(adapter: PlannedAdapter, weight: torch.Tensor, options: StartOptions) -> StartingFactors:
    """Draw the right factor Kaiming-uniform with a = √5, which is uniform in ±1/√in; ΔW = 0."""
    right = torch.empty(adapter.rank, adapter.site.in_features, dtype=adapter.dtype, device=weight.device)
    torch.nn.init.kaiming_uniform_(right, a=math.sqrt(5))
    return StartingFactors(left=None, right=right)

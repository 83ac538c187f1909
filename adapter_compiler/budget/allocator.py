"""Give a budget of triplets to the sites: the best scores over all of them live."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


@torch.no_grad()
def allocate_best(scores: Sequence[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """Masks, True for exactly ``budget`` triplets with the greatest scores over all sites.

    Equal scores are settled by order (site, then triplet), so every rank and every run agrees.

    Args:
        scores: one tensor [r] a site.
        budget: how many triplets may live; the number of triplets at most.
    """
    device = scores[0].device
    dtype = functools.reduce(torch.promote_types, [score.dtype for score in scores])
    everything = torch.cat([score.to(device=device, dtype=dtype) for score in scores])
    order = torch.sort(everything, descending=True, stable=True).indices
    mask = torch.zeros(everything.shape, dtype=torch.bool, device=device)
    mask[order[:budget]] = True
    parts = mask.split([len(score) for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]

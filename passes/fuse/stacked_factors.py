"""Concatenate the factors of several adapters along the rank, so that one product serves all of them.

``sites`` are the operands of each site as in :func:`passes.fuse.fused_ops.fused_linears`: W, b, P, λ, Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def split_ranks(stacked: torch.Tensor, sites: Sequence[Any]) -> Sequence[torch.Tensor]:
    """Split [Σr, ...] into the part of each site, [r, ...]."""
    return stacked.split([len(site[4]) for site in sites]) if len(sites) > 1 else [stacked]


def join_factors(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The factors [r, ...] concatenated to [Σr, ...]; a view if they are adjacent in memory, as in flat buffers."""
    first = factors[0]
    if len(factors) == 1:
        return cast(first, dtype)
    if _are_adjacent(factors):
        return cast(first.as_strided((sum(map(len, factors)), *first.shape[1:]), first.stride()), dtype)
    return cast(torch.cat(list(factors)), dtype)


def _are_adjacent(factors: Sequence[torch.Tensor]) -> bool:
    if torch.compiler.is_compiling() or not all(type(f) in (torch.Tensor, torch.nn.Parameter) for f in factors):
        return False
    first = factors[0]
    storage, row, offset = first.untyped_storage()._cdata, first.stride(0), first.storage_offset()
    for factor in factors:
        is_next = factor.storage_offset() == offset and factor.is_contiguous() and factor.dtype == first.dtype
        if not is_next or factor.untyped_storage()._cdata != storage:
            return False
        offset += len(factor) * row
    return True


def join_lambdas(sites: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """λ of all sites as a column, [Σr, 1]; 1 for sites without λ."""
    parts = [site[4].new_ones(len(site[4])) if site[3] is None else site[3] for site in sites]
    return join_factors(parts, dtype).unsqueeze(1)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype; the tensor itself if it has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

"""Merge an adapter into a weight a few rows at a time, in the memory of the weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from passes.adapt.fold_adapters import merge_weight
from passes.planning.plan import PlannedAdapter

#: Values of a weight that are summed at once: two megabytes in float64.
_VALUES_AT_A_TIME = 1 << 18

#: Forms that can be merged by rows, and the parameter whose rows are those of ΔW.
_BY_ROWS = {"svd": "P", "lora": "B"}


def merge_into(weight: torch.Tensor, planned: PlannedAdapter, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """W + ΔW, rescaled if the form rescales; a large weight is overwritten, a small one is not."""
    if planned.site.rows is not None:
        return _merge_into_rows(weight, planned, parameters)
    rows = max(1, _VALUES_AT_A_TIME // max(1, planned.site.in_features))
    if planned.form.name not in _BY_ROWS or planned.site.transposed or weight.shape[0] <= rows:
        return merge_weight(weight, planned, parameters).weight
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        weight[start : start + rows] = _merge_rows(planned, parameters, block, start)
    return weight


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight has neither inf nor nan; their sum shows it, for which nothing of the weight's size is made."""
    return math.isfinite(float(weight.sum(dtype=torch.float64)))


@torch.no_grad()
def _merge_into_rows(
    weight: torch.Tensor, planned: PlannedAdapter, parameters: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The weight, of which the rows that the adapter covers are overwritten; a stack has very many of these."""
    weight = weight.detach().contiguous()
    rows = planned.site.to_matrix(weight)
    site = dataclasses.replace(planned.site, shape=tuple(rows.shape), transposed=False, op="linear", rows=None)
    rows.copy_(merge_weight(rows, dataclasses.replace(planned, site=site), parameters).weight)
    return weight


def _merge_rows(
    planned: PlannedAdapter, parameters: Mapping[str, torch.Tensor], block: torch.Tensor, start: int
) -> torch.Tensor:
    """The rows of W + ΔW from ``start`` on, as many as ``block`` has."""
    site = dataclasses.replace(planned.site, shape=tuple(block.shape))
    part = dataclasses.replace(planned, site=site, rank=min(planned.rank, site.largest_rank))
    left = _BY_ROWS[planned.form.name]
    own = {**parameters, left: parameters[left][start : start + len(block)]}
    return merge_weight(block, part, own).weight

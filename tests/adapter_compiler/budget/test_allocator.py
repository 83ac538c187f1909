"""The best triplets over all sites live: exactly as many as asked, ties by order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapter_compiler.budget.allocator import allocate_best

# few values, so that most draws have ties
SCORES = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=6), min_size=1, max_size=5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    scores = draw(SCORES)
    return scores, draw(st.integers(0, sum(map(len, scores))))


def as_tensors(scores: list[list[float]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor(site, dtype=dtype) for site in scores]


@given(case=cases())
def test_exactly_the_budget_and_ties_by_site_then_triplet(case: tuple[list[list[float]], int]) -> None:
    scores, budget = case
    masks = allocate_best(as_tensors(scores), budget)
    places = [(-score, i, j) for i, site in enumerate(scores) for j, score in enumerate(site)]
    kept = {(i, j) for _, i, j in sorted(places)[:budget]}
    found = {(i, j) for i, mask in enumerate(masks) for j, lives in enumerate(mask.tolist()) if lives}
    assert found == kept
    assert [mask.shape for mask in masks] == [(len(site),) for site in scores]
    assert all(mask.dtype == torch.bool for mask in masks)


@given(case=cases())
def test_a_smaller_budget_keeps_a_subset(case: tuple[list[list[float]], int]) -> None:
    scores, budget = case
    larger = torch.cat(allocate_best(as_tensors(scores), budget))
    smaller = torch.cat(allocate_best(as_tensors(scores), max(0, budget - 1)))
    assert not (smaller & ~larger).any()


def test_scores_closer_than_float32_are_told_apart() -> None:
    scores = [torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float32)]
    masks = allocate_best(scores, 1)
    assert [mask.tolist() for mask in masks] == [[False, True], [False]]

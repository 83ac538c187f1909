"""The best triplets over all sites live: exactly as many as requested, ties broken by order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapter_compiler.training.scoring.allocator import (
    Request,
    allocate_best,
    allocate_by_site,
    choose_grown,
    share_out,
)

# few values, so that most draws have ties
SCORES = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=6), min_size=1, max_size=5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    scores = draw(SCORES)
    return scores, draw(st.integers(0, sum(map(len, scores))))


def make_request(
    scores: list[list[float]],
    budget: int,
    *,
    costs: list[int] | None = None,
    low: list[int] | None = None,
    high: list[int] | None = None,
    preferred: Tensor | None = None,
) -> Request:
    sizes = [len(site) for site in scores]
    return Request(
        scores=torch.tensor([score for site in scores for score in site], dtype=torch.float64),
        sizes=sizes,
        budget=budget,
        costs=costs or [1] * len(sizes),
        low=low or [0] * len(sizes),
        high=high or sizes,
        preferred=preferred,
    )


def count(mask: Tensor, request: Request) -> list[int]:
    return [int(part.sum()) for part in mask.split(list(request.sizes))]


@given(case=cases())
def test_exactly_the_budget_and_ties_by_site_then_triplet(case: tuple[list[list[float]], int]) -> None:
    scores, budget = case
    masks = allocate_best(make_request(scores, budget)).split([len(site) for site in scores])
    places = [(-score, i, j) for i, site in enumerate(scores) for j, score in enumerate(site)]
    kept = {(i, j) for _, i, j in sorted(places)[:budget]}
    found = {(i, j) for i, mask in enumerate(masks) for j, lives in enumerate(mask.tolist()) if lives}
    assert found == kept
    assert [mask.shape for mask in masks] == [(len(site),) for site in scores]
    assert all(mask.dtype == torch.bool for mask in masks)


@given(case=cases())
def test_a_smaller_budget_keeps_a_subset(case: tuple[list[list[float]], int]) -> None:
    scores, budget = case
    larger = allocate_best(make_request(scores, budget))
    smaller = allocate_best(make_request(scores, max(0, budget - 1)))
    assert not (smaller & ~larger).any()


def test_scores_closer_than_float32_are_distinguished() -> None:
    assert allocate_best(make_request([[1.0, 1.0 + 1e-12], [0.5]], 1)).tolist() == [False, True, False]


@given(case=cases(), least=st.integers(0, 3), most=st.integers(0, 6), data=st.data())
def test_bounds_hold_and_the_rest_of_the_budget_is_spent(
    case: tuple[list[list[float]], int], least: int, most: int, data: st.DataObject
) -> None:
    scores, _ = case
    low = [min(least, len(site), most) for site in scores]
    high = [min(max(least, most), len(site)) for site in scores]
    budget = data.draw(st.integers(sum(low), sum(map(len, scores))))
    request = make_request(scores, budget, low=low, high=high)
    ranks = count(allocate_best(request), request)
    assert all(a <= rank <= b for a, rank, b in zip(low, ranks, high, strict=True))
    assert sum(ranks) == min(budget, sum(high))


def test_costs_are_never_overspent_and_density_decides() -> None:
    # by score the expensive site is better; by score per parameter the cheap one is
    request = make_request([[5.0, 4.0], [3.0, 2.0]], 25, costs=[20, 5])
    assert allocate_best(request).tolist() == [False, False, True, True]
    # the remaining 5 are too few for an expensive triplet, but a later cheap one still fits
    request = make_request([[50.0, 4.0], [3.0, 2.0]], 26, costs=[20, 5])
    assert allocate_best(request).tolist() == [True, False, True, False]


@given(case=cases(), data=st.data())
def test_costs_are_kept_within_the_budget(case: tuple[list[list[float]], int], data: st.DataObject) -> None:
    scores, _ = case
    costs = [data.draw(st.integers(1, 9)) for _ in scores]
    budget = data.draw(st.integers(0, 60))
    request = make_request(scores, budget, costs=costs)
    ranks = count(allocate_best(request), request)
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert spent <= budget
    spare = [cost for cost, rank, site in zip(costs, ranks, scores, strict=True) if rank < len(site)]
    assert all(spent + cost > budget for cost in spare), "no triplet that still fits is left out"


def test_preferred_triplets_come_first_but_minima_before_them() -> None:
    preferred = torch.tensor([False, False, False, True])
    request = make_request([[9.0, 8.0], [7.0, 0.0]], 2, preferred=preferred)
    assert allocate_best(request).tolist() == [True, False, False, True]
    request = make_request([[9.0, 8.0], [7.0, 0.0]], 2, preferred=preferred, low=[2, 0])
    assert allocate_best(request).tolist() == [True, True, False, False]


def test_grown_are_the_pruned_with_the_greatest_gradient() -> None:
    live = torch.tensor([True, False, False, True, False])
    growth = torch.tensor([9.0, 1.0, 3.0, 8.0, 2.0])
    assert choose_grown(growth, live, 2).tolist() == [False, False, True, False, True]
    assert choose_grown(growth, live, 9).tolist() == [False, True, True, False, True]


@given(data=st.data(), sites=st.integers(1, 7))
def test_shares_follow_importance_within_bounds_and_never_overspend(data: st.DataObject, sites: int) -> None:
    importance = [data.draw(st.floats(0, 10)) for _ in range(sites)]
    low = [data.draw(st.integers(0, 2)) for _ in range(sites)]
    high = [a + data.draw(st.integers(0, 6)) for a in low]
    budget = data.draw(st.integers(sum(low), sum(high) + 5))
    ranks = share_out(budget, importance, [1] * sites, low, high)
    assert all(a <= rank <= b for a, rank, b in zip(low, ranks, high, strict=True))
    assert sum(ranks) == min(budget, sum(high))


def test_shares_are_rounded_by_largest_remainders() -> None:
    assert share_out(10, [1.0, 1.0, 1.0], [1] * 3, [0] * 3, [9] * 3) == [4, 3, 3]
    assert share_out(10, [5.5, 3.3, 1.2], [1] * 3, [0] * 3, [9] * 3) == [6, 3, 1]
    assert share_out(10, [0.0, 0.0], [1] * 2, [0] * 2, [9] * 2) == [5, 5], "without importance all sites are equal"
    assert share_out(9, [1.0, 1.0], [2, 1], [0] * 2, [9] * 2) == [2, 5]


def test_by_site_keeps_the_best_of_each() -> None:
    request = make_request([[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]], 4)
    assert allocate_by_site(request, [3.0, 1.0]).tolist() == [True, True, True, True, False, False]

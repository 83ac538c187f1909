"""Statistics and scores of triplets against the formulas written out entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapter_compiler.training.scoring.importance import measure_update_norms
from adapter_compiler.training.scoring.metrics import (
    GrowthTracker,
    ImportanceMetric,
    MagnitudeMetric,
    SensitivityMetric,
    SpectralMetric,
)
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from tests.adapter_compiler.training.buffers import find_triplets, make_buffers

BETA1, BETA2 = 0.85, 0.6
#: 5 × 4 of rank 3 twice, so that they are stacked, and 6 × 2 of rank 2.
SHAPES = ((5, 4, 3), (6, 2, 2), (5, 4, 3))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def set_gradients(triplets: TripletBuffers) -> None:
    for parameter in triplets.parameters.values():
        parameter.grad = torch.randn_like(parameter)


def sum_by_hand(triplets: TripletBuffers, values: dict[tuple[str, str], Tensor]) -> list[float]:
    """The score S of every triplet from s of every element."""
    found = []
    for site in triplets.sites:
        lam, P, Q = (values[site, name] for name in ("lam", "P", "Q"))
        for i in range(len(lam)):
            column = sum(float(P[j, i]) for j in range(P.shape[0])) / P.shape[0]
            row = sum(float(Q[i, j]) for j in range(Q.shape[1])) / Q.shape[1]
            found.append(float(lam[i]) + column + row)
    return found


@pytest.mark.parametrize("flat", [True, False])
def test_averages_and_scores_follow_the_paper(flat: bool) -> None:
    triplets = make_buffers(SHAPES, flat=flat)
    assert len(triplets.values) == (1 if flat else 9)
    metric = SensitivityMetric(triplets, BETA1, BETA2)
    mean = {key: torch.zeros_like(p) for key, p in triplets.parameters.items()}
    unc = {key: torch.zeros_like(p) for key, p in triplets.parameters.items()}
    for _ in range(4):
        set_gradients(triplets)
        metric.update(triplets, triplets.gather_gradients())
        for key, p in triplets.parameters.items():
            assert p.grad is not None
            for index in range(p.numel()):
                w, g = float(p.detach().flatten()[index]), float(p.grad.flatten()[index])
                new = BETA1 * float(mean[key].flatten()[index]) + (1 - BETA1) * abs(w * g)
                spread = BETA2 * float(unc[key].flatten()[index]) + (1 - BETA2) * abs(abs(w * g) - new)
                mean[key].view(-1)[index], unc[key].view(-1)[index] = new, spread
    expected = sum_by_hand(triplets, {key: mean[key] * unc[key] for key in mean})
    assert metric.scores(triplets).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("flat", [True, False])
def test_importance_is_of_the_last_step_and_magnitude_is_of_the_update(flat: bool) -> None:
    triplets = make_buffers(SHAPES, flat=flat)
    importance, magnitude = ImportanceMetric(triplets), MagnitudeMetric()
    for _ in range(2):
        set_gradients(triplets)
        importance.update(triplets, triplets.gather_gradients(), grad_scale=4.0)
    last = {key: (p.detach() * p.grad / 4).abs() for key, p in triplets.parameters.items() if p.grad is not None}
    assert importance.scores(triplets).tolist() == pytest.approx(sum_by_hand(triplets, last), rel=1e-12)
    expected = [
        float(torch.linalg.matrix_norm(lam[i] * torch.outer(P[:, i], Q[i])).detach())
        for lam, P, Q in find_triplets(triplets)
        for i in range(len(lam))
    ]
    assert magnitude.scores(triplets).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("flat", [True, False])
def test_spectral_scores_are_the_singular_values_of_the_update(flat: bool) -> None:
    triplets = make_buffers(SHAPES, flat=flat)
    scores = SpectralMetric().scores(triplets).split(triplets.sizes)
    sizes = MagnitudeMetric().scores(triplets).split(triplets.sizes)
    for (lam, P, Q), score, size in zip(find_triplets(triplets), scores, sizes, strict=True):
        values = torch.linalg.svdvals(P.detach() @ torch.diag(lam.detach()) @ Q.detach())[: len(lam)]
        torch.testing.assert_close(score.sort(descending=True).values, values, rtol=1e-10, atol=1e-12)
        assert torch.equal(score.argsort(descending=True), size.argsort(descending=True))


def test_parallel_triplets_count_once_and_pruned_ones_are_last() -> None:
    triplets = make_buffers(((5, 4, 3),))
    lam, P, Q = (factor.detach() for factor in find_triplets(triplets)[0])
    P[:, 1], Q[1] = P[:, 0], Q[0]
    lam.copy_(torch.tensor([1.0, 2.0, 0.0]))
    scores = SpectralMetric().scores(triplets)
    assert float(scores[1]) == pytest.approx(float(3 * P[:, 0].norm() * Q[0].norm()))
    torch.testing.assert_close(scores[[0, 2]], torch.zeros(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("flat", [True, False])
def test_growth_follows_the_gradient_of_lambda(flat: bool) -> None:
    triplets = make_buffers(SHAPES, flat=flat)
    tracker = GrowthTracker(triplets, BETA1)
    expected = torch.zeros(8, dtype=torch.float64)
    for _ in range(3):
        set_gradients(triplets)
        tracker.update(triplets, triplets.gather_gradients(), grad_scale=2.0)
        now = torch.cat([lam.grad for lam, _, _ in find_triplets(triplets) if lam.grad is not None]).abs() / 2
        expected = BETA1 * expected + (1 - BETA1) * now
    torch.testing.assert_close(tracker.growth, expected)


def test_a_parameter_without_gradient_decays() -> None:
    """It counts as a gradient of zero: I = 0, so the mean shrinks by β1."""
    triplets = make_buffers(SHAPES)
    absent, zero = SensitivityMetric(triplets, BETA1, BETA2), SensitivityMetric(triplets, BETA1, BETA2)
    for metric in (absent, zero):
        metric.update(triplets, triplets.gather_gradients())
    for parameter in triplets.parameters.values():
        parameter.grad = None
    absent.update(triplets, triplets.gather_gradients())
    for parameter in triplets.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    zero.update(triplets, triplets.gather_gradients())
    torch.testing.assert_close(absent.scores(triplets), zero.scores(triplets), rtol=0, atol=0)
    assert absent.scores(triplets).gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_do_not_round_to_zero(dtype: torch.dtype) -> None:
    """|w · g| near 1e-6 squares to 1e-12, which is zero in float16."""
    triplets, reference = make_buffers(SHAPES, dtype), make_buffers(SHAPES, torch.float64)
    for narrow, wide in zip(triplets.parameters.values(), reference.parameters.values(), strict=True):
        assert narrow.grad is not None
        wide.data.copy_(narrow.data)
        narrow.grad.mul_(1e-6)
        wide.grad = narrow.grad.double()
    metrics = [SensitivityMetric(one, BETA1, BETA2) for one in (triplets, reference)]
    for _ in range(2):
        for metric, one in zip(metrics, (triplets, reference), strict=True):
            metric.update(one, one.gather_gradients())
    scores, expected = (metric.scores(one) for metric, one in zip(metrics, (triplets, reference), strict=True))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    assert scores.gt(0).all()


def test_update_norms_are_those_of_the_products() -> None:
    triplets = make_buffers(SHAPES)
    norms = measure_update_norms(triplets)
    for site, (lam, P, Q) in zip(triplets.sites, find_triplets(triplets), strict=True):
        expected = torch.linalg.matrix_norm((P * lam) @ Q)
        assert norms[site] == pytest.approx(float(expected.detach()), rel=1e-10)

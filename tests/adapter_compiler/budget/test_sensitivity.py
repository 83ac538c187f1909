"""Ī, U and the scores of triplets against the formulas written out entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapter_compiler.budget.sensitivity import SensitivityTracker

BETA1, BETA2 = 0.85, 0.6


def make_parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """λ, P, Q of two sites: 5 × 4 of rank 3, 6 × 2 of rank 2."""
    shapes = [(3,), (5, 3), (3, 4), (2,), (6, 2), (2, 2)]
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_averages_and_scores_follow_the_paper() -> None:
    parameters = make_parameters()
    tracker = SensitivityTracker(parameters, BETA1, BETA2)
    mean = [torch.zeros_like(p) for p in parameters]
    unc = [torch.zeros_like(p) for p in parameters]
    for _ in range(4):
        set_gradients(parameters)
        tracker.update(parameters)
        for k, p in enumerate(parameters):
            assert p.grad is not None
            for index in range(p.numel()):
                w, g = float(p.detach().flatten()[index]), float(p.grad.flatten()[index])
                new = BETA1 * float(mean[k].flatten()[index]) + (1 - BETA1) * abs(w * g)
                spread = BETA2 * float(unc[k].flatten()[index]) + (1 - BETA2) * abs(abs(w * g) - new)
                mean[k].view(-1)[index], unc[k].view(-1)[index] = new, spread
    scores = tracker.triplet_scores()
    assert [len(score) for score in scores] == [3, 2]
    s = [m * u for m, u in zip(mean, unc, strict=True)]
    for site, score in enumerate(scores):
        lam, P, Q = s[3 * site : 3 * site + 3]
        for i, found in enumerate(score.tolist()):
            column = sum(float(P[j, i]) for j in range(P.shape[0])) / P.shape[0]
            row = sum(float(Q[i, j]) for j in range(Q.shape[1])) / Q.shape[1]
            assert found == pytest.approx(float(lam[i]) + column + row, rel=1e-12)


def test_a_parameter_without_gradient_decays() -> None:
    """As if its gradient were zero: I = 0, so the mean shrinks by β1."""
    both = [make_parameters(), make_parameters()]
    for twin, parameter in zip(*both, strict=True):
        twin.data.copy_(parameter.data)
    trackers = [SensitivityTracker(parameters, BETA1, BETA2) for parameters in both]
    for parameters, tracker in zip(both, trackers, strict=True):
        torch.manual_seed(1)
        set_gradients(parameters)
        tracker.update(parameters)
    for absent, zero in zip(*both, strict=True):
        absent.grad, zero.grad = None, torch.zeros_like(zero)
    for parameters, tracker in zip(both, trackers, strict=True):
        tracker.update(parameters)
    torch.testing.assert_close(trackers[0].triplet_scores(), trackers[1].triplet_scores(), rtol=0, atol=0)
    assert all(score.gt(0).all() for score in trackers[0].triplet_scores())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_do_not_round_to_zero(dtype: torch.dtype) -> None:
    """|w · g| near 1e-6 squares to 1e-12, which float16 holds as zero."""
    parameters = make_parameters(dtype)
    tracker = SensitivityTracker(parameters, BETA1, BETA2)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    reference = SensitivityTracker(wide, BETA1, BETA2)
    for _ in range(2):
        set_gradients(parameters)
        for narrow, p in zip(parameters, wide, strict=True):
            assert narrow.grad is not None
            narrow.grad.mul_(1e-6)
            p.grad = narrow.grad.double()
        tracker.update(parameters)
        reference.update(wide)
    scores: list[Tensor] = [score.double() for score in tracker.triplet_scores()]
    torch.testing.assert_close(scores, reference.triplet_scores(), rtol=1e-4, atol=0)
    assert all(score.gt(0).all() for score in scores)

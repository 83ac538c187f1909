"""The regulariser's closed-form gradient against autograd through the regulariser itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapter_compiler.budget.regulariser import add_regulariser_gradient, measure_orthogonality
from adapter_compiler.budget.sensitivity import Triplets

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4)


def make_triplets(shapes: list[tuple[int, int, int]], dtype: torch.dtype = torch.float64) -> list[Triplets]:
    """λ, P, Q for each (out, in, rank); all have a gradient."""
    triplets: list[Triplets] = []
    for out, fan_in, rank in shapes:
        lam, P, Q = (nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((rank,), (out, rank), (rank, fan_in)))
        for parameter in (lam, P, Q):
            parameter.grad = torch.randn_like(parameter)
        triplets.append((lam, P, Q))
    return triplets


def write_out(triplets: list[Triplets], semantics: str) -> Tensor:
    """Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖², or peft's mean of unsquared norms."""
    norms = []
    for _, P, Q in triplets:
        for gram in (P.T @ P, Q @ Q.T):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return torch.stack(norms).mean() if semantics == "peft" else torch.stack(norms).square().sum()


@pytest.mark.parametrize("semantics", ["paper", "peft"])
@settings(deadline=None, max_examples=25)
@given(shapes=SHAPES, gamma=st.floats(1e-3, 2), grad_scale=st.sampled_from([1.0, 1024.0]), seed=st.integers(0, 99))
def test_added_gradient_is_autograds(
    semantics: str, shapes: list[tuple[int, int, int]], gamma: float, grad_scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    triplets = make_triplets(shapes)
    factors = [factor for triplet in triplets for factor in triplet]
    before = [factor.grad.clone() for factor in factors if factor.grad is not None]
    added = torch.autograd.grad(gamma * write_out(triplets, semantics), factors, materialize_grads=True)
    add_regulariser_gradient(triplets, gamma, semantics, grad_scale)
    for factor, old, new in zip(factors, before, added, strict=True):
        expected = old + grad_scale * new
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad, expected, rtol=1e-9, atol=1e-9 * grad_scale)


@settings(deadline=None, max_examples=10)
@given(shapes=SHAPES)
def test_measure_is_the_sum_over_sites(shapes: list[tuple[int, int, int]]) -> None:
    triplets = make_triplets(shapes)
    assert measure_orthogonality(triplets) == pytest.approx(float(write_out(triplets, "paper").detach()), rel=1e-9)


@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_parameters_without_gradient_are_left_alone(semantics: str) -> None:
    triplets = make_triplets([(4, 3, 2), (5, 5, 2)])
    (lam, P, Q), (other_lam, other_P, other_Q) = triplets
    P.grad = other_Q.grad = None
    add_regulariser_gradient(triplets, 0.1, semantics)
    assert P.grad is None
    assert other_Q.grad is None
    assert all(p.grad is not None for p in (lam, Q, other_lam, other_P))


@pytest.mark.parametrize("grad_scale", [1.0, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_orthonormal_factors_get_no_gradient(semantics: str, dtype: torch.dtype, grad_scale: float) -> None:
    """The unsquared norm has no derivative at zero; it must not give nan, however gradients are scaled."""
    P, Q = nn.Parameter(torch.eye(4, 2, dtype=dtype)), nn.Parameter(torch.eye(2, 5, dtype=dtype))
    P.grad, Q.grad = torch.ones_like(P), torch.ones_like(Q)
    add_regulariser_gradient([(torch.zeros(2, dtype=dtype), P, Q)], 0.5, semantics, grad_scale)
    assert P.grad.eq(1).all()
    assert Q.grad.eq(1).all()
    assert measure_orthogonality([(torch.zeros(2, dtype=dtype), P, Q)]) == 0

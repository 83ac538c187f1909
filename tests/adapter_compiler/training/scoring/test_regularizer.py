"""The regularizer's closed-form gradient against autograd through the regularizer itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapter_compiler.training.scoring.regularizer import add_regularizer_gradient
from tests.adapter_compiler.training.buffers import find_triplets, make_buffers

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4)


def write_out(triplets: list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]], semantics: str) -> Tensor:
    """Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖², or peft's mean of unsquared norms."""
    norms = []
    for _, P, Q in triplets:
        for gram in (P.T @ P, Q @ Q.T):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return torch.stack(norms).mean() if semantics == "peft" else torch.stack(norms).square().sum()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("semantics", ["paper", "peft"])
@settings(deadline=None, max_examples=25)
@given(shapes=SHAPES, gamma=st.floats(1e-3, 2), grad_scale=st.sampled_from([1.0, 1024.0]), seed=st.integers(0, 99))
def test_added_gradient_is_autograds(
    semantics: str, flat: bool, shapes: list[tuple[int, int, int]], gamma: float, grad_scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    triplets = make_buffers(shapes, flat=flat)
    found = find_triplets(triplets)
    factors = [factor for triplet in found for factor in triplet]
    before = [factor.grad.clone() for factor in factors if factor.grad is not None]
    added = torch.autograd.grad(gamma * write_out(found, semantics), factors, materialize_grads=True)
    gradients = triplets.gather_gradients()
    add_regularizer_gradient(triplets, gradients, gamma, semantics, grad_scale)
    triplets.scatter_gradients(gradients)
    for factor, old, new in zip(factors, before, added, strict=True):
        expected = old + grad_scale * new
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad, expected, rtol=1e-9, atol=1e-9 * grad_scale)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_parameters_without_gradient_do_not_change(semantics: str, flat: bool) -> None:
    triplets = make_buffers([(4, 3, 2), (5, 5, 2)], flat=flat)
    (lam, P, Q), (other_lam, other_P, other_Q) = find_triplets(triplets)
    P.grad = other_Q.grad = None
    gradients = triplets.gather_gradients()
    add_regularizer_gradient(triplets, gradients, 0.1, semantics)
    triplets.scatter_gradients(gradients)
    assert P.grad is None
    assert other_Q.grad is None
    assert all(p.grad is not None for p in (lam, Q, other_lam, other_P))


@pytest.mark.parametrize("grad_scale", [1.0, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_orthonormal_factors_get_no_gradient(semantics: str, dtype: torch.dtype, grad_scale: float) -> None:
    """The norm has no derivative at zero; it must not give nan, at any scale of the gradients."""
    triplets = make_buffers([(4, 5, 2)], dtype)
    ((_, P, Q),) = find_triplets(triplets)
    P.data.copy_(torch.eye(4, 2, dtype=dtype))
    Q.data.copy_(torch.eye(2, 5, dtype=dtype))
    before = [gradient.clone() for gradient in triplets.gather_gradients()]
    gradients = triplets.gather_gradients()
    add_regularizer_gradient(triplets, gradients, 0.5, semantics, grad_scale)
    torch.testing.assert_close(gradients, before, rtol=0, atol=0)

"""Directions against singular value decompositions, over shapes, ranks and scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_compiler.model.optimizers.directions import normalize_vectors, orthogonalize

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31 - 1)
#: Squares of the smallest underflow in float32, and those of the largest overflow.
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def find_polar(n: torch.Tensor, rank: int) -> torch.Tensor:
    """The polar factor from the ``rank`` largest singular values."""
    U, _, V = torch.linalg.svd(n, full_matrices=False)
    polar: torch.Tensor = U[..., :rank] @ V[..., :rank, :]
    return polar


@given(rows=SIZES, columns=SIZES, count=st.integers(1, 3), seed=SEEDS, scale=SCALES)
def test_orthogonalize_is_the_polar_factor(rows: int, columns: int, count: int, seed: int, scale: float) -> None:
    n = draw(seed, count, rows, columns)
    condition = float(torch.linalg.cond(n).max())
    torch.testing.assert_close(
        orthogonalize(n * scale), find_polar(n, min(rows, columns)), rtol=0, atol=1e-14 * condition**2 + 1e-12
    )


@given(rows=SIZES, columns=SIZES, seed=SEEDS, rank=st.integers(0, 4), scale=SCALES)
def test_missing_directions_are_zero(rows: int, columns: int, seed: int, rank: int, scale: float) -> None:
    rank = min(rank, rows, columns)
    left, right = torch.linalg.qr(draw(seed, rows, rank)).Q, torch.linalg.qr(draw(seed + 1, columns, rank)).Q
    n = (left * torch.arange(1, rank + 1)) @ right.mT
    found = orthogonalize(n.float() * scale)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, (left @ right.mT).float(), rtol=0, atol=2e-3)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, scale=SCALES, dim=st.sampled_from([-2, -1]))
def test_vectors_get_the_length_one(rows: int, columns: int, seed: int, scale: float, dim: int) -> None:
    n = draw(seed, 2, rows, columns, dtype=torch.float32) * scale
    n.select(-1 if dim == -2 else -2, 0).zero_()
    found = normalize_vectors(n, dim)
    expected = torch.ones_like(found.sum(dim))
    expected[:, 0] = 0
    torch.testing.assert_close(torch.linalg.vector_norm(found, dim=dim), expected)
    assert bool((found * n >= 0).all())


@pytest.mark.parametrize("rows", [7, 3])
def test_a_column_of_zeros_does_not_change_the_others(rows: int) -> None:
    n = draw(0, 2, rows, 3)
    padded = torch.cat([n[..., :1], torch.zeros(2, rows, 2, dtype=n.dtype), n[..., 1:]], -1)
    found = orthogonalize(padded)
    torch.testing.assert_close(found[..., [0, 3, 4]], orthogonalize(n), rtol=0, atol=1e-12)
    assert float(found[..., 1:3].abs().max()) < 1e-14

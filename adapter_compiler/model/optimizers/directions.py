"""The directions of an update: the momentum of a factor without its lengths.

    muon       u = n (nᵀn)^(-1/2)    all singular values become 1
    triplet    u_i = n_i / ‖n_i‖     the vector of each triplet gets the length 1

All functions take stacks [..., a, b] of matrices. Their results do not depend on the scale of n, and directions in
which n is zero within rounding become zero, so that a result is never inf or nan.
"""

from __future__ import annotations

import torch


def orthogonalize(n: torch.Tensor) -> torch.Tensor:
    """The polar factors n (nᵀn)^(-1/2) of tall matrices, and (n nᵀ)^(-1/2) n of wide ones.

    Computed by an eigendecomposition of the smaller Gram matrix, r × r for a factor of rank r. Eigenvalues of at most
    eps times the largest one count as zero.

    Args:
        n: [..., a, b], finite, in float32 or float64.
    """
    is_tall = n.shape[-2] > n.shape[-1]
    # Products of short and long rows are faster than those of long and short columns.
    wide = _divide_by_largest(n.mT.contiguous() if is_tall else n)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    is_used = values > torch.finfo(n.dtype).eps * values[..., -1:]
    inverse = values.where(is_used, 1).rsqrt().where(is_used, 0)
    u: torch.Tensor = ((vectors * inverse.unsqueeze(-2)) @ vectors.mT) @ wide
    return u.mT if is_tall else u


def normalize_vectors(n: torch.Tensor, dim: int) -> torch.Tensor:
    """Each vector along ``dim`` divided by its length; vectors of zeros stay zero.

    Args:
        n: [..., a, b], finite, in float32 or float64.
        dim: -2 for the columns of P, -1 for the rows of Q.
    """
    n = _divide_by_largest(n)
    size = n.abs().sum(dim, keepdim=True)
    n = n / size.where(size > 0, 1)
    length = n.square().sum(dim, keepdim=True).sqrt()
    unit: torch.Tensor = n / length.where(length > 0, 1)
    return unit


def _divide_by_largest(n: torch.Tensor) -> torch.Tensor:
    """Divide each matrix by its largest absolute value, because squares of small elements would underflow."""
    largest = n.abs().amax((-2, -1), keepdim=True)
    divided: torch.Tensor = n / largest.where(largest > 0, 1)
    return divided

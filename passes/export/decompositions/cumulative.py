"""Cumulative operators that the ONNX exporter has no translation for, or a wrong one.

ONNX has a cumulative sum only. Where the length n of a dimension is known, others are computed in log₂ n steps of

    y_i ← y_i ∘ y_(i - 2^k)      for k = 0, 1, …

(Hillis and Steele 1986). Where the file must work for any length, the values are spread to an n × n matrix whose row i
holds the values up to i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def multiply_up(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The cumulative product along a dimension."""
    wanted = dtype or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
    if not x.dim():
        return x.to(wanted)
    y = x.to(torch.float32 if wanted in _HALF else wanted).movedim(dim, -1)
    if isinstance(y.shape[-1], int):
        distance = 1
        while distance < y.shape[-1]:
            y = torch.cat([y[..., :distance], y[..., distance:] * y[..., :-distance]], -1)
            distance *= 2
    else:
        y = torch.where(_find_earlier(y), y.unsqueeze(-2), torch.ones_like(y).unsqueeze(-2)).prod(-1)
    return y.to(wanted).movedim(-1, dim)


def make_powers(x: Tensor, *, N: int | None = None) -> Tensor:
    """x_i^j for j = 0 … N-1, [..., n, N]."""
    count = x.shape[-1] if N is None else N
    ones = torch.ones_like(x).unsqueeze(-1)
    factors = x.unsqueeze(-1).expand(*x.shape, count - 1)
    return multiply_up(torch.cat([ones, factors], -1), -1)


def make_vandermonde(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    """The same with the highest power first by default."""
    powers = make_powers(x, N=N)
    return powers if increasing else powers.flip(-1)


def add_up(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The cumulative sum in half precision, which the exporter gives as float32."""
    wanted = x.dtype if dtype is None else dtype
    return x.to(torch.float32).cumsum(dim).to(wanted) if wanted in _HALF else NotImplemented


def add_exponentials_up(x: Tensor, dim: int) -> Tensor:
    """ln Σ_(j ≤ i) exp(x_j), each with the largest x_j taken out so that nothing overflows."""
    if not x.dim():
        return x.clone()
    y = x.movedim(dim, -1)
    spread = y.unsqueeze(-2).masked_fill(~_find_earlier(y), float("-inf"))
    largest = spread.amax(-1, keepdim=True)
    shift = torch.where(largest.isinf(), 0.0, largest)
    return ((spread - shift).exp().sum(-1).log() + shift.squeeze(-1)).movedim(-1, dim)


def find_largest_up_to(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest value so far, and the last place where it is."""
    return _find_extreme_up_to(x, dim, torch.amax, is_largest=True)


def find_smallest_up_to(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The smallest value so far, and the last place where it is."""
    return _find_extreme_up_to(x, dim, torch.amin, is_largest=False)


def _find_extreme_up_to(
    x: Tensor, dim: int, reduce: Callable[..., Tensor], *, is_largest: bool
) -> tuple[Tensor, Tensor]:
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    y = x.movedim(dim, -1)
    earlier = _find_earlier(y)
    # A row that reaches beyond i holds its first value instead, which is among those up to i.
    spread = torch.where(earlier, y.unsqueeze(-2), y[..., :1].unsqueeze(-2))
    values = reduce(spread, -1)
    hits = earlier & (y.unsqueeze(-2) == values.unsqueeze(-1))
    places = torch.arange(y.shape[-1], device=x.device)
    indices = torch.where(hits, places, -1).amax(-1)
    return values.movedim(-1, dim), indices.movedim(-1, dim)


def _find_earlier(y: Tensor) -> Tensor:
    """Whether j ≤ i, [n, n], for the last dimension of y."""
    places = torch.arange(y.shape[-1], device=y.device)
    return places[None, :] <= places[:, None]


RULES: Mapping[str, Callable[..., object]] = {
    "aten::cumprod": multiply_up,
    "aten::linalg_vander": make_powers,
    "aten::vander": make_vandermonde,
    "aten::cumsum": add_up,
    "aten::logcumsumexp": add_exponentials_up,
    "aten::cummax": find_largest_up_to,
    "aten::cummin": find_smallest_up_to,
}

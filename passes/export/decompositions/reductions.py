"""Reductions that the ONNX exporter has no translation for, or a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def count_bins(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """``torch.histc``: how many elements of x are in each of ``bins`` equal bins between ``min`` and ``max``, [bins].

    If both limits are 0, the range of x is used.
    """
    values = x.flatten()
    low, high = values.new_full((), min), values.new_full((), max)
    if min == max == 0:
        low, high = values.min(), values.max()
    index = torch.floor((values - low) * bins / (high - low)).clamp(max=bins - 1)
    inside = (values >= low) & (values <= high)
    wanted = torch.arange(bins, device=x.device).to(index.dtype)
    hits = (index[:, None] == wanted) & inside[:, None]
    return hits.to(torch.int64).sum(0).to(x.dtype)


def reduce_to_largest(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The largest value of x over all dimensions; not implemented for selected dimensions."""
    return NotImplemented if dim or keepdim else x.max()


def reduce_to_least(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The smallest value of x over all dimensions; not implemented for selected dimensions."""
    return NotImplemented if dim or keepdim else x.min()


def holds_all(x: Tensor) -> Tensor:
    """Whether every element is true."""
    return x.all()


def holds_any(x: Tensor) -> Tensor:
    """Whether an element is true."""
    return x.any()


def multiply_all(x: Tensor, *where: int | bool, dtype: torch.dtype | None = None) -> Tensor:
    """The product of a half-precision tensor, over a dimension or all of it; the exporter gives it as float32."""
    wanted = x.dtype if dtype is None else dtype
    if wanted not in _HALF:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.prod(x.to(torch.float32), *where).to(wanted)


def average_as(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The mean in another dtype, which the exporter applies after the mean instead of before it."""
    if dtype is None or dtype == x.dtype:
        return NotImplemented  # type: ignore[no-any-return]
    return x.to(dtype).mean() if dim is None else x.to(dtype).mean(dim, keepdim)  # type: ignore[call-overload]


RULES: Mapping[str, Callable[..., Tensor]] = {
    "aten::histc": count_bins,
    "aten::amax": reduce_to_largest,
    "aten::amin": reduce_to_least,
    "aten::_is_all_true": holds_all,
    "aten::_is_any_true": holds_any,
    "aten::prod": multiply_all,
    "aten::mean": average_as,
}

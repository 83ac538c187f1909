"""Operators that sort or search, written with a plain sort or with comparisons of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def sort_stably(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """A stable sort; ONNX's keeps the order of equal values anyway."""
    return torch.ops.aten.sort.default(x, dim, descending)  # type: ignore[no-any-return]


def find_kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest value along a dimension, and its place."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, indices = torch.sort(x, dim)
    return _pick(values, k - 1, dim, keepdim), _pick(indices, k - 1, dim, keepdim)


def find_median(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The lower of the middle values along a dimension and its place, or that of all values; nan if there is one."""
    if dim is None:
        return find_median(x.flatten(), 0)[0]
    middle = (x.shape[dim] - 1) // 2 if x.dim() else 0
    values, indices = find_kth(x, middle + 1, dim, keepdim)
    if x.is_floating_point():
        is_nan = x.isnan().any(dim, keepdim) if x.dim() else x.isnan()
        values = torch.where(is_nan, float("nan"), values)
        first_nan = x.isnan().to(torch.int32).argmax(dim, keepdim) if x.dim() else indices
        indices = torch.where(is_nan, first_nan, indices)
    return values, indices


def find_median_without_nan(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The same of the values that are numbers."""
    if not x.is_floating_point():
        return find_median(x, dim, keepdim)
    if dim is None:
        return find_median_without_nan(x.flatten(), 0)[0]
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    # Infinity sorts behind all numbers; what is larger than every number is never the lower middle of them.
    is_nan = x.isnan()
    count = (~is_nan).sum(dim, keepdim=True)
    values, indices = torch.sort(torch.where(is_nan, float("inf"), x), dim)
    place = ((count - 1).clamp(min=0)) // 2
    found, where = values.gather(dim, place), indices.gather(dim, place)
    found = torch.where(count == 0, float("nan"), found)
    return (found, where) if keepdim else (found.squeeze(dim), where.squeeze(dim))


def find_mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The most frequent value along a dimension, the smallest of several, and the last place where it is."""
    if not x.dim():
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    y = x.movedim(dim, -1)
    counts = (y.unsqueeze(-1) == y.unsqueeze(-2)).sum(-1)
    is_frequent = counts == counts.amax(-1, keepdim=True)
    # Values that are not among the most frequent are replaced by one that is.
    frequent = y.gather(-1, counts.argmax(-1, keepdim=True))
    values = torch.where(is_frequent, y, frequent).amin(-1, keepdim=True)
    places = torch.arange(y.shape[-1], device=x.device)
    indices = torch.where(y == values, places, -1).amax(-1, keepdim=True)
    values, indices = values.movedim(-1, dim), indices.movedim(-1, dim)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def search_sorted(
    sorted_sequence: Tensor,
    values: Tensor | float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Where each value would be inserted into a sorted sequence [..., n], by counting what is before it."""
    if not isinstance(values, Tensor):
        values = torch.full((), values, dtype=sorted_sequence.dtype, device=sorted_sequence.device)
    if sorter is not None:
        sorted_sequence = sorted_sequence.gather(-1, sorter)
    below = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    is_before = below <= values.unsqueeze(-1) if right or side == "right" else below < values.unsqueeze(-1)
    return is_before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def is_in(
    elements: Tensor | float, test_elements: Tensor | float, *, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    """Whether each element is among the others, by comparing all pairs."""
    one, others = (v if isinstance(v, Tensor) else torch.full((), v) for v in (elements, test_elements))
    found = (one.unsqueeze(-1) == others.flatten()).any(-1)
    return ~found if invert else found


def _pick(x: Tensor, place: int, dim: int, keepdim: bool) -> Tensor:
    picked = x.narrow(dim, place, 1)
    return picked if keepdim else picked.squeeze(dim)


RULES: Mapping[str, Callable[..., object]] = {
    "aten::kthvalue": find_kth,
    "aten::median": find_median,
    "aten::nanmedian": find_median_without_nan,
    "aten::mode": find_mode,
    "aten::searchsorted": search_sorted,
    "aten::isin": is_in,
    "aten::sort.stable": sort_stably,  # the other overload has a translation
}

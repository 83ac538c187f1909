"""Operators that move values to other places: scatters, rolls, splits, windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def scatter_means(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """Means of the values that are scattered to each place, which the exporter takes for sums."""
    if reduce != "mean":
        return NotImplemented  # type: ignore[no-any-return]
    count = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(src))
    total = torch.zeros_like(x).scatter_add(dim, index, src)
    if include_self:
        count, total = count + 1, total + x
    rounding = None if x.is_floating_point() else "floor"
    return torch.where(count > 0, torch.div(total, count.clamp(min=1), rounding_mode=rounding), x)


def reduce_at_indices(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce rows of ``source`` into the rows of x that ``index`` names."""
    shape = [1] * source.dim()
    if shape:
        shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    return torch.scatter_reduce(x, dim, places, source, reduce, include_self=include_self)


def put_values(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Write values at places of the flattened tensor."""
    places = torch.where(index < 0, index + x.numel(), index).flatten()
    flat = x.flatten()
    changed = flat.scatter_add(0, places, source.flatten()) if accumulate else flat.scatter(0, places, source.flatten())
    return changed.reshape(x.shape)


def roll_by_symbols(x: Tensor, shifts: Sequence[int | torch.SymInt], dims: Sequence[int] = ()) -> Tensor:
    """A roll by shifts that depend on sizes; the exporter needs numbers."""
    if not dims or not any(isinstance(shift, torch.SymInt) for shift in shifts):
        return NotImplemented  # type: ignore[no-any-return]
    for shift, dim in zip(shifts, dims, strict=True):
        x = _roll(x, (x.shape[dim] - shift) % x.shape[dim], dim)
    return x


def shift_zero_to_center(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """The second half of each dimension before the first."""
    for place in range(x.dim()) if dim is None else dim:
        x = _roll(x, (x.shape[place] + 1) // 2, place)
    return x


def shift_zero_to_front(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """The inverse of :func:`shift_zero_to_center`."""
    for place in range(x.dim()) if dim is None else dim:
        x = _roll(x, x.shape[place] // 2, place)
    return x


def _roll(x: Tensor, begin: int | torch.SymInt, dim: int) -> Tensor:
    """The entries from ``begin`` on, then those before."""
    return torch.cat([x.narrow(dim, begin, x.shape[dim] - begin), x.narrow(dim, 0, begin)], dim)


def split_unevenly(x: Tensor, split_size: int | torch.SymInt, dim: int = 0) -> list[Tensor]:
    """Parts of which the last is smaller, or of a size that depends on that of an input."""
    size = x.shape[dim]
    if not split_size or (isinstance(split_size, int) and (not isinstance(size, int) or size % split_size == 0)):  # type: ignore[redundant-expr]
        return NotImplemented  # type: ignore[no-any-return]
    count = int((size + split_size - 1) // split_size)
    return [torch.ops.aten.slice.Tensor(x, dim, i * split_size, (i + 1) * split_size) for i in range(count)]


def make_hamming_window(
    window_length: int,
    periodic: bool = True,
    alpha: float = 0.54,
    beta: float = 0.46,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """α - β cos(2 π k / n), with PyTorch's coefficients; ONNX has others."""
    wanted = dtype or torch.get_default_dtype()
    if window_length == 1:
        return torch.ones(1, dtype=wanted, device=device)
    return (alpha - beta * torch.cos(_spread_phase(window_length, periodic, device))).to(wanted)


def make_bartlett_window(
    window_length: int,
    periodic: bool = True,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """1 - |2 k / n - 1|."""
    wanted = dtype or torch.get_default_dtype()
    if window_length == 1:
        return torch.ones(1, dtype=wanted, device=device)
    return (1 - (_spread_phase(window_length, periodic, device) / math.pi - 1).abs()).to(wanted)


def _spread_phase(length: int, periodic: bool, device: torch.device | None) -> Tensor:
    """The angles 2 π k / n, one for each value of a window."""
    period = length if periodic else length - 1
    return torch.arange(length, dtype=torch.float64, device=device) * (2 * math.pi / period)


RULES: Mapping[str, Callable[..., object]] = {
    "aten::scatter_reduce": scatter_means,
    "aten::index_reduce": reduce_at_indices,
    "aten::put": put_values,
    "aten::roll": roll_by_symbols,
    "aten::fft_fftshift": shift_zero_to_center,
    "aten::fft_ifftshift": shift_zero_to_front,
    "aten::split": split_unevenly,
    "aten::hamming_window": make_hamming_window,
    "aten::bartlett_window": make_bartlett_window,
}

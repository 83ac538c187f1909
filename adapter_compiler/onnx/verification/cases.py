"""The inputs that a file is verified on: the example, other sizes, and random values in the example's ranges.

Random values reveal a branch that an exporter made constant, other sizes a dimension that it fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from adapter_compiler.onnx.verification.inputs import spell_names
from adapter_compiler.onnx.verification.sizes import (
    Bounds,
    Place,
    SizeGroup,
    choose_sizes,
    find_size_groups,
    resize,
)
from passes.capture.calls import ModuleCall, split_call

#: Random inputs that a file is verified on.
DRAWS = 3
#: A traced file may have constant branches, so it is verified on more of them.
_DRAWS_FOR_TRACES = 8
#: Where the tracer warned of constant values, inputs outside the example's range must agree as well.
_FACTORS_FOR_FROZEN = (-1.0, 10.0, -10.0)
#: Inputs that the name of a case lists one by one.
_KEPT_IN_A_NAME = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationCase:
    """One input.

    Attributes:
        name: ``example``, ``batch 5``, ``dimension 1 of size 9``, ``random values 1``; where some inputs could not
            be resized with the others, ``batch 5 (image kept at 2)``.
        call: the arguments.
        places: the dimensions that the case is there to resize; none for the example and for random values.
        alternatives: what to use instead, in order, if the model refuses ``call`` or gives no finite values for it.
    """

    name: str
    call: ModuleCall
    places: frozenset[Place] = frozenset()
    alternatives: tuple[VerificationCase, ...] = ()


def choose_variety(draws: int, *, is_traced: bool, is_frozen: bool = False) -> tuple[int, tuple[float, ...]]:
    """``draws`` and ``factors`` for :func:`find_cases`: a traced file is verified on more inputs."""
    return (max(draws, _DRAWS_FOR_TRACES) if is_traced else draws), (_FACTORS_FOR_FROZEN if is_frozen else ())


def find_cases(
    call: ModuleCall,
    bounds: Bounds,
    *,
    draws: int = DRAWS,
    factors: Sequence[float] = (),
) -> Iterator[VerificationCase]:
    """The example, one case for each group of open dimensions, and ``draws`` random ones of the example's sizes.

    ``factors`` scale the example's floating-point values beyond its range, one case each.
    """
    yield VerificationCase(name="example", call=call)
    groups = find_size_groups(call, bounds)
    for group in groups:
        first, *others = (_resize_case(call, bounds, group, sizes) for sizes in choose_sizes(group, groups, call))
        yield dataclasses.replace(first, places=group.places, alternatives=tuple(others))
    if not call.tensors:
        return
    generator = torch.Generator().manual_seed(0)
    for number in range(1, draws + 1):
        drawn = _replace_tensors(call, lambda tensor: draw_like(tensor, generator))
        yield _with_shuffled(f"random values {number}", drawn, call, generator)
    for factor in factors:
        scaled = _replace_tensors(call, lambda tensor: _scale(tensor, factor))  # noqa: B023 - called at once
        yield _with_shuffled(f"values times {factor:g}", scaled, call, generator)


def _with_shuffled(name: str, call: ModuleCall, example: ModuleCall, generator: torch.Generator) -> VerificationCase:
    shuffled = VerificationCase(name=name, call=shuffle_call(example, generator))
    return VerificationCase(name=name, call=call, alternatives=(shuffled,))


def draw_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values between the least and the greatest one of ``tensor``, of its shape and dtype.

    Floating-point values come from a random part of that range, so that their mean moves from draw to draw: a
    branch on it shows. A floating-point tensor of a single value, which is a placeholder, gets values of both
    signs up to it. Flags and other tensors of two values keep theirs, with the rows in another order.
    """
    if not tensor.numel() or tensor.is_complex():
        return tensor
    values = tensor.unique()
    if _is_flag(tensor):
        return _shuffle_rows(tensor, generator) if tensor.dim() else tensor
    if not tensor.is_floating_point():
        return torch.randint(int(values[0]), int(values[-1]) + 1, tensor.shape, generator=generator, dtype=tensor.dtype)
    finite = values[values.isfinite()].double()
    if not len(finite):
        return tensor
    low, high = float(finite[0]), float(finite[-1])
    low, high = (-abs(high), abs(high)) if low == high else (low, high)
    ends = low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
    low, high = float(ends.min()), float(ends.max())
    drawn = low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return torch.where(tensor.isfinite(), drawn.to(tensor.dtype), tensor)


def shuffle_call(call: ModuleCall, generator: torch.Generator) -> ModuleCall:
    """The example's own values with rows and columns in another order, the same one for every tensor.

    Columns of flags stay: a padding mask with its padding elsewhere is another kind of input.
    """
    orders: dict[tuple[int, int], torch.Tensor] = {}

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        for dimension, size in enumerate(tensor.shape[: 1 if _is_flag(tensor) else 2]):
            key = (dimension, size)
            if key not in orders:
                orders[key] = torch.randperm(size, generator=generator)
            tensor = tensor.index_select(dimension, orders[key])
        return tensor

    return _replace_tensors(call, reorder)


def _resize_case(call: ModuleCall, bounds: Bounds, group: SizeGroup, sizes: Mapping[Place, int]) -> VerificationCase:
    resized = resize(call, sizes)
    first = min(place for place in sizes if place in group.places)
    kind = "batch" if group.dimension == 0 else f"dimension {group.dimension} of size"
    name = f"{kind} {sizes[first]}{_spell_other(call, group, sizes)}{_spell_kept(call, resized, bounds, group)}"
    return VerificationCase(name=name, call=resized)


def _spell_other(call: ModuleCall, group: SizeGroup, sizes: Mapping[Place, int]) -> str:
    """The first input of another group that was resized as well."""
    other = next((place for place in sizes if place not in group.places), None)
    return "" if other is None else f" and {spell_names(call.names)[other.tensor]} {sizes[other]}"


def _spell_kept(call: ModuleCall, resized: ModuleCall, bounds: Bounds, group: SizeGroup) -> str:
    """Which inputs kept their size in this dimension although it is the batch, of the same size, or open."""
    inputs = zip(spell_names(call.names), call.tensors, resized.tensors, bounds, strict=True)
    dimension = group.dimension
    touched = {place.tensor for place in group.places}
    kept = [
        f"{name} kept at {before.shape[dimension]}"
        for i, (name, before, after, bound) in enumerate(inputs)
        if i not in touched
        and before.dim() > dimension
        and before.shape[dimension] == after.shape[dimension]
        and (dimension == 0 or before.shape[dimension] == group.size or bound[dimension].symbol is not None)
    ]
    if len(kept) > _KEPT_IN_A_NAME:
        kept = [kept[0], f"{len(kept) - 1} more"]
    return f" ({', '.join(kept)})" if kept else ""


def _is_flag(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds flags: booleans, or two whole numbers."""
    if tensor.dtype is torch.bool or tensor.is_complex():
        return tensor.dtype is torch.bool
    values = tensor.unique()
    return len(values) == 2 and not bool(values.remainder(1).any())


def _scale(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor * factor if tensor.is_floating_point() and not _is_flag(tensor) else tensor


def _shuffle_rows(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return tensor.index_select(0, torch.randperm(tensor.shape[0], generator=generator))


def _replace_tensors(call: ModuleCall, replace: Callable[[torch.Tensor], torch.Tensor]) -> ModuleCall:
    return split_call(*call.rebuild([replace(tensor) for tensor in call.tensors]))

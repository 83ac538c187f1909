"""Resize the tensors of a call, and find which of their dimensions are resized together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from passes.capture.calls import ModuleCall, split_call
from passes.capture.capture import DimensionBound

#: For each tensor of a call, for each of its dimensions, the sizes that a file is valid for.
Bounds = Sequence[Sequence[DimensionBound]]


class Place(NamedTuple):
    """One dimension of one tensor of a call, both by their numbers."""

    tensor: int
    dimension: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeGroup:
    """Open dimensions that are resized together.

    Attributes:
        dimension: the number of the first one within its tensor.
        size: its size in the example.
        places: all of them.
        parts: the same, those of one symbol together.
    """

    dimension: int
    size: int
    places: frozenset[Place]
    parts: tuple[frozenset[Place], ...]


def find_places(call: ModuleCall) -> list[Place]:
    """Every dimension of every tensor, the first dimensions first."""
    places = [Place(i, d) for i, tensor in enumerate(call.tensors) for d in range(tensor.dim())]
    return sorted(places, key=lambda place: (place.dimension, place.tensor))


def size_of(call: ModuleCall, place: Place) -> int:
    """The size of a dimension."""
    return call.tensors[place.tensor].shape[place.dimension]


def resize(call: ModuleCall, sizes: Mapping[Place, int]) -> ModuleCall:
    """The call with dimensions of other sizes. Entries are repeated or dropped, so values stay within the example's."""
    tensors = list(call.tensors)
    for place, size in sizes.items():
        index = torch.arange(size, device=tensors[place.tensor].device) % size_of(call, place)
        tensors[place.tensor] = tensors[place.tensor].index_select(place.dimension, index)
    return split_call(*call.rebuild(tensors))


def find_size_groups(call: ModuleCall, bounds: Bounds) -> list[SizeGroup]:
    """The open dimensions in groups, those of the batch first.

    Dimensions of one symbol belong together. So do dimensions of the same number and size in different tensors (a
    label for each row), even where the model's code does not connect them.
    """
    found = [(Place(i, d), bound.symbol) for i, one in enumerate(bounds) for d, bound in enumerate(one)]
    symbols = dict(sorted(found, key=lambda pair: (pair[0].dimension, pair[0].tensor)))
    groups: list[SizeGroup] = []
    grouped: set[str | None] = {None}
    for place, symbol in symbols.items():
        if symbol in grouped:
            continue
        alike = [p for p in symbols if p.dimension == place.dimension and size_of(call, p) == size_of(call, place)]
        own = {symbols[p] for p in alike} - grouped
        grouped |= own
        parts = tuple(frozenset(p for p in symbols if symbols[p] == one) for one in sorted(map(str, own)))
        places = frozenset[Place]().union(*parts)
        groups.append(SizeGroup(dimension=place.dimension, size=size_of(call, place), places=places, parts=parts))
    return groups


def choose_sizes(group: SizeGroup, others: Sequence[SizeGroup], call: ModuleCall) -> Iterator[dict[Place, int]]:
    """Other sizes for a group: alone, with one more group, and with all that change in the same way.

    Alone is enough for most models. Lengths may depend on each other, such as a mask over a cache and the tokens after
    it, or be multiples of a number, or have their largest value in the example. Last, the dimensions of each symbol.
    """
    change = 1 if group.size > 1 else 2
    partners = [frozenset[Place](), *(other.places for other in others if other is not group)]
    ends = list(dict.fromkeys([partners[0], partners[0].union(*partners)]))
    ways: list[tuple[Callable[[int], int], Sequence[frozenset[Place]]]] = [
        (lambda size: size + change, partners),
        (lambda size: 2 * size, partners),
        (lambda size: size + change, ends[1:]),
        (lambda size: size - 1, ends),
        (lambda size: size // 2, ends),
    ]
    for resized, together in ways:
        for also in together:
            sizes = {place: resized(size_of(call, place)) for place in sorted(group.places | also)}
            if min(sizes.values()) > 1:  # a size of one is broadcast, so it says nothing about others
                yield sizes
    for part in group.parts if len(group.parts) > 1 else ():
        yield {place: group.size + change for place in sorted(part)}

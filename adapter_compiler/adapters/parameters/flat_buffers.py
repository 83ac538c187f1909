"""The positions of parameters in a few flat buffers, so that one kernel can process all of them.

Parameters of one dtype, device and family share a buffer. First in it are the λ of all sites, without gaps; then all
other parameters, ordered by name and shape, so that a view gives parameters of one shape as a stack [n, …]. A layout
is a description only: the same one is used for values, gradients, and AdaLoRA's averages Ī and Ū (eq. 9 and 10).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import torch

#: Offsets, except those of λ, are multiples of this many elements: vector loads need 16 bytes, cache lines have 64.
_ALIGNMENT = 16

#: Identifies a parameter: the name of its site, and its name in the adapter.
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Parameters of one name and shape at equal distances in one buffer.

    Attributes:
        name: the parameters' name in their adapters, such as ``P``.
        shape: the shape of each parameter.
        buffer: index of the buffer.
        offset: the first element of the first parameter.
        stride: the number of elements from one parameter to the next.
        keys: the parameters, in order.
    """

    name: str
    shape: tuple[int, ...]
    buffer: int
    offset: int
    stride: int
    keys: tuple[Key, ...]

    def view(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """A view [n, …] of the stack in these buffers."""
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return buffers[self.buffer].as_strided((len(self.keys), *self.shape), (self.stride, *strides), self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatBuffer:
    """The description of one buffer: ``size`` elements, of which the first ``lam`` are the λ of all sites."""

    dtype: torch.dtype
    device: torch.device
    family: Hashable
    size: int
    lam: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """The buffers, and the position of every parameter in them.

    Attributes:
        buffers: the description of each buffer.
        stacks: all parameters, grouped in stacks; λ of different ranks are in different stacks.
    """

    buffers: tuple[FlatBuffer, ...]
    stacks: tuple[Stack, ...]

    def allocate(self) -> list[torch.Tensor]:
        """Buffers of zeros."""
        return [torch.zeros(b.size, dtype=b.dtype, device=b.device) for b in self.buffers]

    def views(self, buffers: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """A view of the buffers for each parameter, in its shape."""
        found: dict[Key, torch.Tensor] = {}
        for stack in self.stacks:
            found.update(zip(stack.keys, stack.view(buffers).unbind(), strict=True))
        return found

    def select(self, family: Hashable) -> FlatLayout:
        """The part of the layout that has the buffers of one family."""
        kept = [i for i, buffer in enumerate(self.buffers) if buffer.family == family]
        stacks = [dataclasses.replace(s, buffer=kept.index(s.buffer)) for s in self.stacks if s.buffer in kept]
        return FlatLayout(buffers=tuple(self.buffers[i] for i in kept), stacks=tuple(stacks))


def plan_layout(parameters: Mapping[Key, torch.Tensor], families: Mapping[Key, Hashable]) -> FlatLayout:
    """Assign each parameter a position.

    Args:
        parameters: the parameters; only their shapes, dtypes and devices matter.
        families: the family of each; different families never share a buffer.
    """
    members: dict[tuple[torch.dtype, torch.device, Hashable], list[Key]] = {}
    for key, parameter in parameters.items():
        members.setdefault((parameter.dtype, parameter.device, families[key]), []).append(key)
    buffers, stacks = [], []
    for index, ((dtype, device, family), keys) in enumerate(members.items()):
        ordered = sorted(keys, key=lambda key: _order(key, parameters[key]))
        own, size, lam = _stack_up(ordered, parameters, index)
        stacks += own
        buffers.append(FlatBuffer(dtype=dtype, device=device, family=family, size=size, lam=lam))
    return FlatLayout(buffers=tuple(buffers), stacks=tuple(stacks))


def _order(key: Key, parameter: torch.Tensor) -> tuple[object, ...]:
    """A sort key: λ in the order of the sites, the others by name and shape (sorting is stable)."""
    is_lam = key[1] == "lam"
    return (not is_lam, key[1], () if is_lam else tuple(parameter.shape))


def _stack_up(keys: Sequence[Key], parameters: Mapping[Key, torch.Tensor], buffer: int) -> tuple[list[Stack], int, int]:
    """The stacks of one buffer, its size, and the number of λ at its start."""
    stacks: list[Stack] = []
    offset = lam = 0
    for key in keys:
        shape = tuple(parameters[key].shape)
        is_lam = key[1] == "lam"
        if not is_lam:
            offset = _align(offset)
        if stacks and (stacks[-1].name, stacks[-1].shape) == (key[1], shape):
            stacks[-1] = dataclasses.replace(stacks[-1], keys=(*stacks[-1].keys, key))
        else:
            size = math.prod(shape)
            stride = size if is_lam else _align(size)
            stacks.append(Stack(name=key[1], shape=shape, buffer=buffer, offset=offset, stride=stride, keys=(key,)))
        offset += math.prod(shape)
        lam = offset if is_lam else lam
    return stacks, offset, lam


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT

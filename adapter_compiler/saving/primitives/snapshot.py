"""What objects hold, put back if something fails."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from adapter_compiler.saving.primitives.plain_data import has_same_bits


class Snapshot:
    """What objects hold now, to be put back if something fails: the same tensors in the same places, bit for bit.

    Noted are attributes, the contents of containers, and the memory, values and gradients of tensors. Objects keep
    their identity both ways, so that whoever else refers to them sees nothing of what was undone.
    """

    def __init__(self) -> None:
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._containers: dict[int, tuple[Any, list[Any]]] = {}
        self._tensors: dict[int, _HeldTensor] = {}

    def add_attributes(self, owner: object, *, levels: int | None = None) -> None:
        """Note an object's attributes and the containers in them.

        Args:
            owner: the object.
            levels: how deep to go, without the values of tensors; by default all the way and with them.
        """
        attributes = getattr(owner, "__dict__", None)
        if not isinstance(attributes, dict):
            return
        self._objects.append((owner, type(owner), attributes))
        for tensor in self._walk(attributes, -1 if levels is None else levels):
            if levels is None:
                self.add_tensor(tensor)

    def put_back(self) -> None:
        """Let everything be as it was when it was noted."""
        for owner, cls, attributes in self._objects:
            if type(owner) is not cls:
                object.__setattr__(owner, "__class__", cls)
            if owner.__dict__ is not attributes:
                object.__setattr__(owner, "__dict__", attributes)
        for container, contents in self._containers.values():
            _fill(container, contents)
        for held in self._tensors.values():
            held.put_back()

    @contextlib.contextmanager
    def put_back_if_it_fails(self) -> Iterator[None]:
        """Put everything back if the block raises."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise

    def _walk(self, value: Any, levels: int) -> Iterator[torch.Tensor]:
        """Note containers and give the tensors in them."""
        if isinstance(value, torch.Tensor):
            yield value
        is_container = isinstance(value, (dict, list, set, deque))
        if not levels or id(value) in self._containers or not (is_container or isinstance(value, tuple)):
            return
        contents = list(value.items() if isinstance(value, dict) else value)
        if is_container:
            self._containers[id(value)] = value, contents
        for one in contents:
            # The pairs of a dict are no level of their own.
            for part in one if isinstance(value, dict) else (one,):
                yield from self._walk(part, levels - 1)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Note the memory, values and gradient of a tensor."""
        if id(tensor) not in self._tensors:
            gradient = tensor.grad if tensor.is_leaf else None
            self._tensors[id(tensor)] = _HeldTensor(tensor, gradient)
            if gradient is not None:
                self.add_tensor(gradient)


class _HeldTensor:
    """A tensor, the memory that it has, and what stands there."""

    def __init__(self, tensor: torch.Tensor, gradient: torch.Tensor | None) -> None:
        self._tensor = tensor
        self._gradient = gradient
        self._memory = tensor.detach()
        # Sharded and sparse tensors are copied as they are: their memory is not one piece to be looked at.
        is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        self._has_memory = is_plain and not tensor.is_meta
        self._values = self._memory.to("cpu", copy=True) if self._has_memory else self._memory.clone()

    @torch.no_grad()
    def put_back(self) -> None:
        tensor, memory = self._tensor, self._memory
        if not self._has_memory or not has_same_bits(memory, self._values):
            memory.copy_(self._values)
        if self._has_memory and _place(tensor) != _place(memory):
            # Autograd keeps the old shape for a live graph's sake; it forgets it when the dtype changes.
            tensor.data = torch.empty(0, dtype=torch.float32 if memory.is_complex() else torch.complex64)
            tensor.data = memory
        if tensor.is_leaf and tensor.grad is not self._gradient:
            tensor.grad = self._gradient


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _fill(container: Any, contents: list[Any]) -> None:
    """Give a container what it held, in that order, if it holds anything else."""
    is_dict = isinstance(container, dict)
    if _identify(container.items() if is_dict else container, are_pairs=is_dict) == _identify(
        contents, are_pairs=is_dict
    ):
        return
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(contents)


def _identify(contents: Iterable[Any], *, are_pairs: bool) -> list[Any]:
    return [(id(one[0]), id(one[1])) if are_pairs else id(one) for one in contents]

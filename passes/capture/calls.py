"""A module call as flat tensors plus everything else, and the key under which its graph is kept.

A captured graph is right for one call *signature*: the nesting of the arguments, the dtype, rank
and device of each tensor, and the value of each argument that is not a tensor. The shapes are not
part of it; they are guarded separately, because one graph serves many of them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.base import CaptureError

#: Types of arguments and results that are kept as constants of a graph.
CONSTANT_TYPES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    enum.Enum,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """The arguments of one call, taken apart.

    Attributes:
        tensors: the tensors among the arguments, in pytree order.
        constants: all leaves in pytree order; ``None`` where a tensor stands.
        positions: where in ``constants`` the tensors belong.
        spec: the nesting.
    """

    tensors: tuple[torch.Tensor, ...]
    constants: tuple[Any, ...]
    positions: tuple[int, ...]
    spec: pytree.TreeSpec

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other tensors, as ``(args, kwargs)``."""
        leaves = list(self.constants)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)

    def detached(self) -> ModuleCall:
        """The same call with tensors cut from the graph that computed them."""
        tensors = tuple(t.detach().requires_grad_(t.requires_grad) for t in self.tensors)
        return dataclasses.replace(self, tensors=tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """For each tensor the argument it came from, as in ``args[0]`` or ``mask``."""
        args, kwargs = self.rebuild(self.tensors)
        paths = pytree.tree_flatten_with_path((args, kwargs))[0]
        return tuple(_spell(paths[position][0]) for position in self.positions)

    @property
    def key(self) -> Hashable:
        """Equal for two calls that the same graph may serve, shapes apart."""
        described = tuple(
            (t.dtype, t.dim(), t.device, t.is_contiguous() if t.layout is torch.strided else t.layout)
            for t in self.tensors
        )
        constants = tuple((type(leaf), leaf) for leaf in self.constants)
        return (self.spec, self.positions, described, constants)


def split_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModuleCall:
    """Take a call apart.

    Raises:
        CaptureError: an argument is neither a tensor, nor a plain constant, nor a container of
            those that ``torch.utils._pytree`` can take apart.
    """
    tree = (tuple(args), dict(kwargs))
    leaves, spec = _take_apart(tree, "the arguments")
    positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if any(not isinstance(leaf, CONSTANT_TYPES) for leaf in constants):
        _refuse_unknown_leaves(tree, "argument")
    return ModuleCall(
        tensors=tuple(leaves[i] for i in positions),
        constants=tuple(constants),
        positions=positions,
        spec=spec,
    )


def sort_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments by name, so that their order at the call does not make another signature."""
    return {name: kwargs[name] for name in sorted(kwargs)}


def describe_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The tensors of a call for messages, as in ``args[0]: torch.float32 (2, 5)``."""
    leaves = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return ", ".join(f"{_spell(path)}: {t.dtype} {tuple(t.shape)}" for path, t in tensors) or "no tensors"


def describe_refusal(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> str:
    """The message for a call that the user's own model does not run on."""
    return (
        f"{type(module).__name__} itself refuses the call with {describe_call(args, kwargs)}: {type(error).__name__}: "
        f"{error}; expected arguments that the model runs on; try them on the model without adapters"
    )


def flatten_result(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of what a module returned: tensors, symbolic numbers and plain constants.

    Raises:
        CaptureError: a leaf is an object that may hide tensors.
    """
    leaves, spec = _take_apart(result, "the result")
    symbolic = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    if any(not isinstance(leaf, symbolic + CONSTANT_TYPES) for leaf in leaves):
        _refuse_unknown_leaves(result, "result", symbolic)
    return leaves, spec


def _take_apart(tree: Any, what: str) -> tuple[list[Any], pytree.TreeSpec]:
    try:
        return pytree.tree_flatten(tree)
    except Exception as error:  # classes bring their own code for this
        raise CaptureError(f"{what} cannot be taken apart: {type(error).__name__}: {error}") from error


def _refuse_unknown_leaves(tree: Any, what: str, also: tuple[type, ...] = ()) -> None:
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, (torch.Tensor, *also, *CONSTANT_TYPES)):
            kind = type(leaf)
            raise CaptureError(
                f"{what} {_spell(path)} is a {kind.__module__}.{kind.__qualname__}, expected tensors, numbers, "
                "strings or containers of them; register the class with "
                "torch.utils._pytree.register_pytree_node (torch.export.register_dataclass for a dataclass)"
            )


def _spell(path: Sequence[Any]) -> str:
    """``args[0]['mask']`` for the path of a leaf in ``(args, kwargs)``; keywords lose their quotes."""
    if len(path) < 2 or not isinstance(path[0], pytree.SequenceKey):
        return pytree.keystr(tuple(path)) or "itself"
    if path[0].idx == 0:
        return "args" + pytree.keystr(tuple(path[1:]))
    return f"{getattr(path[1], 'key', path[1])}{pytree.keystr(tuple(path[2:]))}"

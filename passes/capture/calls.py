"""Split a module call into flat tensors and the rest, and compute the key of its signature.

A captured graph is valid for one *signature*: the nesting of the arguments, the dtype, rank and device of each tensor,
and the value of each argument that is not a tensor. Shapes are not part of it; they have separate guards, because one
graph is valid for many shapes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.base import CaptureError
from passes.compat import pytree

#: Types of arguments and results that become constants of a graph.
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
    """The flattened arguments of one call.

    Attributes:
        tensors: the tensors among the arguments, in pytree order.
        constants: all leaves in pytree order, with ``None`` in place of tensors.
        positions: the indices of the tensors in ``constants``.
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
        """The same call with detached tensors, which keep their ``requires_grad``."""
        tensors = tuple(t.detach().requires_grad_(t.requires_grad) for t in self.tensors)
        return dataclasses.replace(self, tensors=tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The argument of each tensor, as in ``args[0]`` or ``mask``."""
        args, kwargs = self.rebuild(self.tensors)
        paths = pytree.tree_flatten_with_path((args, kwargs))[0]
        return tuple(_spell(paths[position][0]) for position in self.positions)

    @property
    def key(self) -> Hashable:
        """The signature of the call: equal for calls that can use the same graph if its shape guards hold."""
        described = tuple(
            (t.dtype, t.dim(), t.device, t.is_contiguous() if t.layout is torch.strided else t.layout)
            for t in self.tensors
        )
        constants = tuple((type(leaf), leaf) for leaf in self.constants)
        return (self.spec, self.positions, described, constants)


def split_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModuleCall:
    """Flatten the arguments of a call.

    Dataclasses among them that torch does not know as containers are registered with
    :func:`torch.export.register_dataclass`, for the process, so that torch's exporters take them apart as well.

    Raises:
        CaptureError: an argument is neither a tensor, nor a plain constant, nor a container of these that
            ``torch.utils._pytree`` can flatten.
    """
    tree = (tuple(args), dict(kwargs))
    leaves, spec = _flatten(tree, "the arguments")
    while _register_dataclasses(leaves):
        leaves, spec = _flatten(tree, "the arguments")
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


def _register_dataclasses(leaves: Sequence[Any]) -> bool:
    """Register the classes of leaves that are dataclasses; whether there were any.

    Those with fields that their constructor does not take cannot be rebuilt, and are left.
    """
    found = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    rebuilt = [one for one in found if all(field.init for field in dataclasses.fields(one))]
    for one in rebuilt:
        torch.export.register_dataclass(one)
    return bool(rebuilt)


def sort_keywords(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments sorted by name, so that their order in the call does not change the signature."""
    return {name: kwargs[name] for name in sorted(kwargs)}


def describe_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The tensors of a call, for messages, as in ``args[0]: torch.float32 (2, 5)``."""
    leaves = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return ", ".join(f"{_spell(path)}: {t.dtype} {tuple(t.shape)}" for path, t in tensors) or "no tensors"


def describe_refusal(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> str:
    """The message for a call that fails in the user's own model."""
    return (
        f"{type(module).__name__} itself refuses the call with {describe_call(args, kwargs)}: {type(error).__name__}: "
        f"{error}; expected arguments that the model runs on; try them on the model without adapters"
    )


def flatten_result(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a module's result (tensors, symbolic numbers and plain constants) and their nesting.

    Raises:
        CaptureError: a leaf is an object that may contain tensors.
    """
    leaves, spec = _flatten(result, "the result")
    symbolic = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    if any(not isinstance(leaf, symbolic + CONSTANT_TYPES) for leaf in leaves):
        _refuse_unknown_leaves(result, "result", symbolic)
    return leaves, spec


def _flatten(tree: Any, what: str) -> tuple[list[Any], pytree.TreeSpec]:
    try:
        return pytree.tree_flatten(tree)
    except Exception as error:  # registered classes run their own code here
        raise CaptureError(f"{what} cannot be flattened: {type(error).__name__}: {error}") from error


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
    """The path of a leaf in ``(args, kwargs)`` as Python writes it, as in ``args[0]['mask']`` or ``mask[0]``."""
    if len(path) < 2 or not isinstance(path[0], pytree.SequenceKey):
        return pytree.keystr(tuple(path)) or "itself"
    if path[0].idx == 0:
        return "args" + pytree.keystr(tuple(path[1:]))
    return f"{getattr(path[1], 'key', path[1])}{pytree.keystr(tuple(path[2:]))}"

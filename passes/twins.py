"""Use the graph of one block for another block that is built the same way.

Two modules are twins if their classes, attributes, shapes and dtypes agree all the way down, except for
values of parameters and buffers and for numbers that only say where the block stands (``layer_idx``).
The graph is then given the other module's tensors, and checked against eager like any capture.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from passes.base import CaptureError, bind_graph_module, make_containers
from passes.calls import ModuleCall
from passes.capture import MODULE_PREFIX, CapturedGraph, check_against_eager
from passes.module_state import HOOK_KINDS
from passes.weight_uses import find_first_names

logger = logging.getLogger(__name__)

_POSITION = re.compile(r"_?(layer|block|stage|depth)?_?(idx|index|id|number|num|i)$")
_REGISTRIES = {"_parameters", "_buffers", "_modules", "training"}


def find_twin_graph(
    module: nn.Module, call: ModuleCall, captured: Iterable[tuple[nn.Module, CapturedGraph]]
) -> CapturedGraph | None:
    """The first graph of a twin of ``module`` that is right for ``call``, over the tensors of ``module``."""
    for other, graph in captured:
        if not is_twin(module, other):
            continue
        try:
            return check_against_eager(module, call, retarget_graph(graph, module))
        except CaptureError as error:
            logger.debug("the graph of a twin is not right: %s", error)
    return None


def is_twin(one: nn.Module, other: nn.Module) -> bool:
    """Whether both compute the same function of their inputs and of their parameters and buffers."""
    mine, theirs = dict(one.named_modules()), dict(other.named_modules())
    if mine.keys() != theirs.keys() or _find_ties(one) != _find_ties(other):
        return False
    return all(_is_alike(module, theirs[name]) for name, module in mine.items())


def find_repeated_modules(module: nn.Module) -> list[str]:
    """Names of the blocks that a model repeats: modules of one class and one set of shapes in one container.

    Of repetitions inside each other the outermost counts.
    """
    found: list[str] = []
    for name, container in module.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or any(name.startswith(f"{n}.") for n in found):
            continue
        kinds: dict[Any, list[str]] = {}
        for key, child in container.named_children():
            shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
            if any(len(shape) > 1 for _, shape in shapes) and next(child.children(), None) is not None:
                kinds.setdefault((type(child), shapes), []).append(f"{name}.{key}" if name else key)
        found += [one for names in kinds.values() if len(names) > 1 for one in names]
    return found


def retarget_graph(captured: CapturedGraph, module: nn.Module) -> CapturedGraph:
    """The same graph, shared, over the parameters and buffers of ``module``.

    Raises:
        CaptureError: the graph holds a tensor that is neither; it may be another one in ``module``.
    """
    graph_module = captured.graph_module
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    own = {MODULE_PREFIX + name: tensor for name, tensor in tensors.items()}
    root = nn.Module()
    for node in graph_module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        path, _, leaf = target.rpartition(".")
        holder = graph_module.get_submodule(path)
        if not isinstance(getattr(holder, leaf), torch.Tensor):
            continue
        if target not in own:
            raise CaptureError(f"the graph holds a constant {target}")
        owner = make_containers(root, path)
        registry: dict[str, Any] = owner._parameters if leaf in holder._parameters else owner._buffers
        registry[leaf] = own[target]
    return dataclasses.replace(captured, graph_module=bind_graph_module(graph_module, root._modules))  # type: ignore[arg-type]


def _find_ties(module: nn.Module) -> dict[str, str]:
    """Every name of a tensor, with the first name of the same one."""
    parameters, buffers = module.named_parameters, module.named_buffers
    return find_first_names((*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)))


def _is_alike(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other) or one.training != other.training:
        return False
    for kind in ("_parameters", "_buffers"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        if mine.keys() != theirs.keys() or not all(_is_same_kind(mine[k], theirs[k]) for k in mine):
            return False
    keys = one.__dict__.keys() | other.__dict__.keys()
    return all(_has_same_attribute(one, other, key) for key in keys - _REGISTRIES)


def _is_same_kind(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.shape, one.dtype, one.device, one.requires_grad) == (
        other.shape,
        other.dtype,
        other.device,
        other.requires_grad,
    )


def _has_same_attribute(one: nn.Module, other: nn.Module, key: str) -> bool:
    if key not in one.__dict__ or key not in other.__dict__:
        return False
    mine, theirs = one.__dict__[key], other.__dict__[key]
    if key in HOOK_KINDS:
        return len(mine) == len(theirs) == 0
    if type(mine) is int and type(theirs) is int and _POSITION.search(key):
        return True
    return _is_equal(mine, theirs)


def _is_equal(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if type(mine) is not type(theirs) or isinstance(mine, (types.FunctionType, types.MethodType)):
        return False
    if isinstance(mine, torch.Tensor):
        same_kind = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        return same_kind and (mine.is_meta or bool(torch.equal(mine, theirs)))
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(_is_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(_is_equal(mine[k], theirs[k]) for k in mine)
    return (
        isinstance(mine, (bool, int, float, str, bytes, torch.dtype, torch.device, set, frozenset)) and mine == theirs
    )

"""What an example call does with every weight of a model, found by recording it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.base import CaptureError
from passes.calls import split_call
from passes.capture import capture_call
from passes.module_state import is_without_memory, restored_state, without_fast_path
from passes.packed_weights import is_packed
from passes.python_uses import WatchWeights
from passes.recording import find_tensors, record_example
from passes.weight_uses import WeightUse, find_parameter_aliases, find_weight_uses

logger = logging.getLogger(__name__)


def discover_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_recorded: bool = True
) -> dict[str, list[WeightUse]]:
    """Every use of every weight by one call, by the weight's first name.

    The operators of the call are recorded as a graph. What a recording does not show, because the model hides it from
    tracing, is taken from watching a plain run. What the runs leave behind (random states, buffers, attributes) is
    undone.

    Args:
        module: the model, without adapters.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        is_recorded: whether the call may be recorded; else it is only watched.

    Raises:
        Exception: whatever the model's own code raises for these arguments.
    """
    weights = {name: p for name, p in module.named_parameters() if p.dim() >= 2}
    watch = WatchWeights(weights)
    with torch.enable_grad(), without_fast_path(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own call will give them
        try:
            with restored_state(module), _own_values(module), _trainable(module), watch:
                module(*args, **kwargs)
        except Exception:
            if not (is_recorded and is_without_memory(module)):
                raise
            return _find_exported_uses(module, args, kwargs)
        recorded = _find_recorded_uses(module, args, kwargs) if is_recorded else {}
        found = {name: list(uses) for name in weights if (uses := recorded.get(name) or watch.uses.get(name))}
        certain = {name for name, uses in recorded.items() if any(use.has_gradient for use in uses)}
        doubtful = {name: p for name, p in weights.items() if name not in certain}
        for name, is_reached in _find_differentiated(module, args, kwargs, doubtful).items():
            seen = found.get(name, [WeightUse(op="torch.func")] if is_reached else [])
            found[name] = [dataclasses.replace(use, has_gradient=is_reached) for use in seen]
        return {name: found[name] for name in weights if name in found}


def _find_recorded_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Sequence[WeightUse]]:
    holder = nn.Module()
    holder.forward = module.__call__
    holder.module = module
    try:
        with _own_values(module):
            graph_module = record_example(holder, args, kwargs)
    except CaptureError as error:
        logger.info("uses of weights are taken from a run and not from a recording: %s", error)
        return {}
    return find_weight_uses(graph_module, find_parameter_aliases(module))


def _find_exported_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[WeightUse]]:
    """Without values, where Python asks for some: torch.export goes on with symbols in their place."""
    captured = capture_call(module, split_call(args, kwargs))
    found = find_weight_uses(captured.graph_module, find_parameter_aliases(module))
    return {name: list(uses) for name, uses in found.items()}


def _find_differentiated(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Mapping[str, nn.Parameter]
) -> dict[str, bool]:
    """Whether the results give each of these weights a gradient; empty where that cannot be told.

    A recording does not show it where ``torch.vmap`` gives operators other tensors than the weights, or where a
    reentrant checkpoint runs without gradients and computes again with them. Watching does not show it where the
    product does not reach a result.
    """
    tried = {name for name, p in weights.items() if not (p.is_meta or is_packed(p))}
    if not tried:
        return {}
    try:
        with restored_state(module), _own_values(module), _trainable(module) as floats:
            results = [t for t in find_tensors(module(*args, **kwargs)) if t.requires_grad]
            if not results:
                return {}
            real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in results]
            torch.stack([t.float().mean().cpu() for t in real]).sum().backward()
            return {name: floats[name].grad is not None for name in tried if name in floats}
    except Exception as error:  # the model's own backward raises what it likes
        logger.info("it cannot be told whether gradients reach %s: %s", ", ".join(tried), error)
        return {}


@contextlib.contextmanager
def _trainable(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, all parameters of floating point train, as in a model that is not frozen; they are given by name."""
    floats = {n: p for n, p in module.named_parameters() if p.is_floating_point() and not is_packed(p)}
    before = {name: (p.requires_grad, p.grad) for name, p in floats.items()}
    try:
        for p in floats.values():
            p.requires_grad_(True)
            p.grad = None
        yield floats
    finally:
        for name, p in floats.items():
            p.requires_grad_(before[name][0])
            p.grad = before[name][1]


@contextlib.contextmanager
def _own_values(module: nn.Module) -> Iterator[None]:
    """Inside, parameters have memory of their own as soon as they are written into; afterwards their values are back.

    The memory of a model's parameters is also that of the model which was handed in.
    """
    plain = [
        p for p in module.parameters() if not is_packed(p) and type(p) is nn.Parameter and p.layout is torch.strided
    ]
    before = [(p, p.data) for p in plain if not p.is_meta]
    try:
        for p, values in before:
            p.data = _clone_lazily(values)
        yield
    finally:
        for p, values in before:
            p.data = values


def _clone_lazily(values: torch.Tensor) -> torch.Tensor:
    """A copy that takes memory when one of both is written into, or at once where memory is not torch's own."""
    try:
        return torch._lazy_clone(values)
    except RuntimeError:  # as of files that are mapped into memory
        return values.clone()

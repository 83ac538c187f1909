"""Weight-use analysis: which operators an example call applies to every weight of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.analysis.python_uses import WatchWeights
from passes.analysis.weight_uses import WeightUse, find_parameter_aliases, find_weight_uses
from passes.base import CaptureError
from passes.capture.calls import split_call
from passes.capture.capture import capture_call
from passes.capture.module_state import is_without_memory, restored_state, without_fast_path
from passes.capture.recording import find_tensors, record_example
from passes.compat import clone_lazily
from passes.quantize.packed_weights import is_packed

logger = logging.getLogger(__name__)


def analyze_weight_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_recorded: bool = True
) -> dict[str, list[WeightUse]]:
    """The uses of every weight by one call, by the weight's first qualified name.

    The operators of the call are recorded as a graph. Uses that the recording does not show, because the model hides
    them from tracing, are taken from watching a plain run. Random states, buffers and attributes that the runs change
    are restored.

    Args:
        module: the model, without adapters.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        is_recorded: whether the call may be recorded; otherwise it is only watched.

    Raises:
        Exception: any exception that the model's own code raises for these arguments.
    """
    weights = {name: p for name, p in module.named_parameters() if p.dim() >= 2}
    watch = WatchWeights(weights)
    with torch.enable_grad(), without_fast_path(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own call shows the warnings
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
        uncertain = {name: p for name, p in weights.items() if name not in certain}
        for name, is_reached in _find_differentiated(module, args, kwargs, uncertain).items():
            uses = found.get(name, [WeightUse(op="torch.func")] if is_reached else [])
            found[name] = [dataclasses.replace(use, has_gradient=is_reached) for use in uses]
        return {name: found[name] for name in weights if name in found}


def _find_recorded_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Sequence[WeightUse]]:
    wrapper = nn.Module()
    wrapper.forward = module.__call__
    wrapper.module = module
    try:
        with _own_values(module):
            graph_module = record_example(wrapper, args, kwargs)
    except CaptureError as error:
        logger.info("weight uses are taken from a plain run, because the call cannot be recorded: %s", error)
        return {}
    return find_weight_uses(graph_module, find_parameter_aliases(module))


def _find_exported_uses(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[WeightUse]]:
    """The uses in a torch.export graph, for a model without memory whose Python needs values of tensors.

    torch.export uses symbols in place of such values.
    """
    captured = capture_call(module, split_call(args, kwargs))
    found = find_weight_uses(captured.graph_module, find_parameter_aliases(module))
    return {name: list(uses) for name, uses in found.items()}


def _find_differentiated(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Mapping[str, nn.Parameter]
) -> dict[str, bool]:
    """Whether a backward from the results gives each of these weights a gradient; empty if backward is not possible.

    A recording cannot tell this if ``torch.vmap`` passes other tensors than the weights to operators, or if a reentrant
    checkpoint runs without gradients and recomputes with them. Watching a run cannot tell whether a product reaches a
    result.
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
    except Exception as error:  # the model's own backward can raise any exception
        logger.info("it is unknown whether gradients reach %s, because backward fails: %s", ", ".join(tried), error)
        return {}


@contextlib.contextmanager
def _trainable(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """A context in which all floating-point parameters require grad; yields these parameters by name."""
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
    """A context in which writes into parameters are made in copies; afterwards the parameters have their old memory.

    The parameters share their memory with those of the user's model, which must not change.
    """
    plain = [
        p for p in module.parameters() if not is_packed(p) and type(p) is nn.Parameter and p.layout is torch.strided
    ]
    before = [(p, p.data) for p in plain if not p.is_meta]
    try:
        for p, values in before:
            p.data = clone_lazily(values)
        yield
    finally:
        for p, values in before:
            p.data = values

"""Record the operators of one call as a graph, for models that torch.export does not support.

torch.export requires that all weights are registered, and supports neither derivatives inside ``forward`` nor
exceptions that the model itself catches. Recording has none of these limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from passes.base import CaptureError, make_containers
from passes.capture.calls import ModuleCall
from passes.capture.module_state import restored_state
from passes.capture.quiet import quiet_loggers
from passes.compat import FAKE_TENSOR_LOGGER, make_fx, pytree

#: On tensors without values: branches on values fail instead of being frozen silently; shapes stay symbolic.
_WITHOUT_VALUES: dict[str, Any] = {"tracing_mode": "symbolic"}
#: On the example itself: branches are decided by its values, and products keep the operators that the model calls.
_WITH_VALUES: dict[str, Any] = {"tracing_mode": "real", "pre_dispatch": True, "_error_on_data_dependent_ops": False}


def record_call(module: nn.Module, call: ModuleCall) -> GraphModule:
    """Record a call as a graph that takes the call's tensors as flat arguments and returns the module's result.

    Weights have their names in ``module``.

    Raises:
        CaptureError: the call cannot be recorded, for example because a branch depends on values.
    """

    def run(*tensors: torch.Tensor) -> object:
        args, kwargs = call.rebuild(tensors)
        return module(*args, **kwargs)

    return _record(module, run, call.tensors, _WITHOUT_VALUES)


def record_example(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphModule:
    """Record one call as a graph that returns every tensor in the result.

    The graph is for analysis only: branches are decided by the example's values, so it must not be run on others.
    Arguments may have any type; tensors inside objects that pytree does not flatten are constants of the graph.

    Raises:
        CaptureError: the call cannot be recorded.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        given = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            given[position] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(given, spec)
        return list(find_tensors(module(*own_args, **own_kwargs)))

    return _record(module, run, [leaves[i] for i in positions], _WITH_VALUES)


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a result, including those in attributes of objects that pytree does not flatten."""
    yield from _walk(value, set())


def _walk(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module) and hasattr(leaf, "__dict__"):
            seen.add(id(leaf))
            yield from _walk(list(vars(leaf).values()), seen)


def _record(
    module: nn.Module, run: Callable[..., object], tensors: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> GraphModule:
    try:
        with restored_state(module), quiet_loggers(FAKE_TENSOR_LOGGER):
            graph_module = make_fx(run, _allow_non_fake_inputs=True, **options)(*tensors)
    except Exception as error:  # the model's own code may raise any exception
        reason = " ".join(str(error).split())[:400]
        raise CaptureError(f"{module._get_name()} cannot be traced: {type(error).__name__}: {reason}") from error
    graph_module.graph.eliminate_dead_code()
    _name_weights(graph_module, module)
    graph_module.recompile()
    return graph_module


def _name_weights(graph_module: GraphModule, module: nn.Module) -> None:
    """Give the weights that were recorded as constants the names that they have in the module."""
    parameters = dict(module.named_parameters())
    names = {id(tensor): name for name, tensor in (*parameters.items(), *module.named_buffers())}
    recorded = [str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")]
    values = {name: getattr(graph_module, name) for name in recorded}
    for name in {*graph_module._parameters, *graph_module._buffers} - {
        n for n, v in values.items() if id(v) not in names
    }:
        delattr(graph_module, name)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = values[str(node.target)]
        if id(value) not in names:
            continue
        node.target = names[id(value)]
        path, _, leaf = node.target.rpartition(".")
        owner = make_containers(graph_module, path)
        if node.target in parameters:
            # The parameters of a ScriptModule are plain tensors.
            is_plain = not isinstance(value, nn.Parameter)
            owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False) if is_plain else value)
        else:
            owner.register_buffer(leaf, value)
